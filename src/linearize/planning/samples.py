"""A model from its config alone, and small samples of it: one layer of each kind, and one more of each. What grows
with the number of layers is measured on the samples and extrapolated linearly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from linearize.errors import InputError, one_line
from linearize.mixers import MixerConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.inspect import list_of_blocks
from linearize.modeling.io.hub import local_copy
from linearize.modeling.io.model_source import find_config
from linearize.modeling.io.model_source import read_config as read_source_config
from linearize.modeling.probe import AttentionSite, probe
from linearize.modeling.surgery import check_plan
from linearize.modeling.truncate import SIMPLE, cut_tree, truncate
from linearize.recipes.schema import Recipe
from linearize.training.memory_simulation import Meter, no_contents, simulation, weight_bytes

Numbers = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Whole:
    """What is known of a whole model: `plan` its mixers by layer, `kinds` the layers of each kind, `draft` the layers
    of a draft (None: the student has the teacher's).

    `small`: the model with the layers `picks` alone, at most two of each kind; `small_draft`: the draft; both without
    contents, made in `mode`.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    plan: Sequence[MixerConfig | None]
    kinds: Sequence[Sequence[int]]
    draft: Sequence[int] | None
    parameters: int
    weight_bytes: int
    layer_bytes: int
    mode: Any
    picks: Sequence[int]
    small: Any
    small_draft: Any

    @property
    def layers(self) -> int:
        """Layers of the teacher."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def model_dim(self) -> int:
        """Width of the hidden states."""
        return int(self.config.get_text_config().hidden_size)


@dataclass(frozen=True, eq=False)
class Sample:
    """A teacher of some of the layers and its student, without contents."""

    teacher: Any
    student: LinearizedForCausalLM
    meter: Meter


@dataclass(frozen=True, eq=False)
class Measured:
    """Numbers of the whole model, of a sample with one layer of each kind, and what one more layer of a kind adds (of
    kinds with more than one)."""

    total: Numbers
    base: Numbers
    per_layer: Sequence[Numbers]

    def largest_layer(self, key: str) -> int:
        """The most that a layer adds; where all layers differ, the whole sample's."""
        return round(max((numbers[key] for numbers in self.per_layer), default=self.base[key]))


def read_config(
    name: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> PreTrainedConfig:
    """A model's config: of a folder (no weights need be there), of a config.json, or of a Hub name.

    Raises:
        InputError: there is none, or it is a student's.
    """
    if revision is not None or token is not None:
        name = local_copy(name, revision=revision, token=token, weights=False).path
    source = find_config(name)
    try:
        config = read_source_config(source)
    except InputError as error:
        raise InputError(f"{error} (give a folder with config.json, a .gguf file or a Hub name)") from error
    if config.model_type == "linearized":
        raise InputError(f"{name} is a student already: give the teacher, a model with softmax attention")
    return config


def look_at(config: PreTrainedConfig, recipe: Recipe, dtype: torch.dtype) -> Whole:
    """Build the whole model without contents and read its structure.

    Raises:
        InputError: a family that cannot be converted, or a plan that does not fit it.
    """
    mode = no_contents()
    with simulation(mode):
        model = build(config, dtype)
        count = int(config.get_text_config().num_hidden_layers)
        path = list_of_blocks(model, count)
        names = [f"{path}.{layer}" for layer in range(count)]
        alike = _groups(range(count), [_described(model.get_submodule(name)) for name in names])
        sites = _sites(model, names, alike)
        draft = recipe.plan.draft_layers(count)
        plan = recipe.plan.resolve(count if draft is None else len(draft), [0.0] * count)
        if draft is None:
            counts = [site.far_groups for site in sites]
            plan = recipe.plan.with_heads(check_plan(plan, sites, config.model_type), counts)
        mixers = [repr(mixer) for mixer in plan] if draft is None else [""] * count
        kinds = [kind for group in alike for kind in _groups(group, [mixers[layer] for layer in group])]
        picks = sorted(layer for kind in kinds for layer in kind[:2])
        return Whole(
            config=config, dtype=dtype, plan=plan, kinds=kinds, draft=draft,
            parameters=sum(p.numel() for p in model.parameters()), weight_bytes=weight_bytes(model),
            layer_bytes=max(weight_bytes(model.get_submodule(name)) for name in names),
            mode=mode, picks=picks, small=cut_tree(model, names, picks),
            small_draft=None if draft is None else truncate(model, draft),
        )  # fmt: skip


def build(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The model of a config, frozen. Raises InputError where transformers cannot build it."""
    try:
        with no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()  # belongs to what was left out: a head is the embedding where the config says so
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"cannot build a causal language model from this config: {one_line(error)}") from error
    return model.eval().requires_grad_(False)


def measured(whole: Whole, measure: Callable[[Sample], Numbers]) -> Measured:
    """The numbers of `measure` for the whole model, from samples of few layers; they must be affine in the layers."""
    first = [kind[0] for kind in whole.kinds]
    base = on_sample(whole, first, measure)
    total, per_layer = dict(base), []
    for kind in whole.kinds:
        if len(kind) > 1:
            more = on_sample(whole, sorted([*first, kind[1]]), measure)
            per_layer.append({key: value - base[key] for key, value in more.items()})
            for key, value in per_layer[-1].items():
                total[key] += value * (len(kind) - 1)
    return Measured(total, base, per_layer)


def on_sample(whole: Whole, layers: Sequence[int], measure: Callable[[Sample], Numbers]) -> Numbers:
    """The numbers of `measure` for a model with only these layers of the teacher."""
    models = [model for model in (whole.small, whole.small_draft) if model is not None]
    with simulation(whole.mode) as meter:
        meter.know(tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
        teacher = _of_small(whole, layers)
        base, plan = (teacher, [whole.plan[i] for i in layers]) if whole.draft is None else (models[1], whole.plan)
        student = LinearizedForCausalLM.from_teacher(base, plan)
        numbers = measure(Sample(teacher, student, meter))
    for model in models:
        model.requires_grad_(False)
    return numbers


def _of_small(whole: Whole, layers: Sequence[int]) -> Any:
    path = list_of_blocks(whole.small, len(whole.picks))
    names = [f"{path}.{position}" for position in range(len(whole.picks))]
    return cut_tree(whole.small, names, [whole.picks.index(layer) for layer in layers])


def _groups(layers: Iterable[int], keys: Iterable[Any]) -> list[list[int]]:
    """The layers that have the same key together."""
    groups: dict[Any, list[int]] = {}
    for layer, key in zip(layers, keys, strict=True):
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _sites(model: Any, names: Sequence[str], alike: Sequence[Sequence[int]]) -> list[AttentionSite]:
    """The attention of every layer, from running one of each that are alike."""
    first = sorted(group[0] for group in alike)
    probed = dict(zip(first, probe(cut_tree(model, names, first)), strict=True))
    sites = {layer: replace(probed[group[0]], layer=layer) for group in alike for layer in group}
    return [sites[layer] for layer in range(len(names))]


def _described(block: nn.Module) -> str:
    """The modules of a layer, their settings, and the sizes of their tensors."""
    parts = []
    for name, module in block.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, SIMPLE)}
        for own in ("layer_idx", "training"):
            plain.pop(own, None)
        sizes = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
        parts.append(f"{name} {type(module).__name__} {sorted(plain.items())} {sizes}")
    return "\n".join(parts)
