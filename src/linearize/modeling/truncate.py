"""A model with only some of its layers: what a draft starts from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from linearize.errors import InputError, one_line
from linearize.modeling.attention import ATTENTION
from linearize.modeling.config import LinearizeConfig
from linearize.modeling.library_internals import set_attention
from linearize.modeling.probe import attention_configs, probe
from linearize.modeling.student import LinearizedForCausalLM
from linearize.modeling.surgery import share_weights

ENTRY_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
LAYER_NUMBERS = ("mlp_only_layers",)
NOT_THE_TEACHERS = ("architectures", "_name_or_path", "transformers_version")
SIMPLE = (bool, int, float, str, tuple, type(None))


def truncate(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """The model with these layers alone, in this order: a module tree of its own over the model's tensors (no copy).

    Embeddings, final norm and head are the model's. What a layer has of its own (mixer, window, positions) stays with
    it, in the config too, so that the result saves and loads as any model of its class. `model` is unchanged.

    Args:
        layers: indices from 0, each at most once.

    Raises:
        InputError: a teacher that cannot be converted, or layers that no config of its family describes.
    """
    if isinstance(model, LinearizedForCausalLM):
        return _truncated_student(model, layers)
    lm = cut_tree(model, [site.name for site in probe(model)], layers)
    _check_config_describes(lm, lm, list_of_layers([site.name for site in probe(lm)]), layers)
    return lm


def block_name(site: str) -> str:
    """The decoder layer of an attention module: its name up to the layer's number."""
    parts = site.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


def _truncated_student(student: LinearizedForCausalLM, layers: Sequence[int]) -> LinearizedForCausalLM:
    lm = cut_tree(student.lm, student.config.attention, layers)
    config = cut_student_config(student.config, layers)
    if all(entry is not None for entry in config.plan):  # as `surgery.install`: no layer needs a T x T mask
        for own in attention_configs(lm):
            set_attention(own, ATTENTION)
    with no_init_weights():
        result = LinearizedForCausalLM(config, lm=lm)
    result.generation_config = copy.deepcopy(student.generation_config)
    _check_config_describes(result, lm, f"lm.{list_of_layers(config.attention)}", layers)
    return result.eval()


def cut_student_config(config: LinearizeConfig, layers: Sequence[int]) -> LinearizeConfig:
    """The student's config with everything that it says by layer cut alike."""
    result, teacher = copy.deepcopy(config), config.teacher_config()
    _cut(teacher.get_text_config(), layers)
    result.teacher = {k: v for k, v in teacher.to_dict().items() if k not in NOT_THE_TEACHERS}
    result.plan = [copy.deepcopy(config.plan[layer]) for layer in layers]
    result.shapes = [dict(config.shapes[layer]) for layer in layers]
    result.attention = [_renumbered(config.attention[layer], new) for new, layer in enumerate(layers)]
    return result


def _renumbered(site: str, layer: int) -> str:
    """An attention module's name in another layer."""
    block = block_name(site)
    return f"{block.rpartition('.')[0]}.{layer}{site.removeprefix(block)}"


def list_of_layers(sites: Sequence[str]) -> str:
    """The module list that holds all layers."""
    return block_name(sites[0]).rpartition(".")[0]


def cut_tree(lm: PreTrainedModel, sites: Sequence[str], layers: Sequence[int]) -> PreTrainedModel:
    """A second module tree over the same tensors with these layers alone, renumbered, and configs that say so."""
    name, result = list_of_layers(sites), share_weights(lm)
    blocks: Any = result.get_submodule(name)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != len(sites):
        raise InputError(f"{lm.config.model_type}: its {len(sites)} layers do not lie in one list; no draft can be cut")
    kept = [blocks[layer] for layer in layers]
    for new, block in enumerate(kept):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new  # type: ignore[assignment]  # nn.Module's attributes are typed as tensors
    result.set_submodule(name, nn.ModuleList(kept))
    texts = {id(text): text for text in (config.get_text_config() for config in attention_configs(result))}
    for text in texts.values():
        _cut(text, layers)
    return result


def _cut(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """What a teacher's config says of its layers, of these alone."""
    for name in ENTRY_PER_LAYER:
        if values := getattr(config, name, None):
            setattr(config, name, [values[layer] for layer in layers])
    for name in LAYER_NUMBERS:
        if values := getattr(config, name, None):
            setattr(config, name, [new for new, layer in enumerate(layers) if layer in values])
    config.num_hidden_layers = len(layers)


def _check_config_describes(model: PreTrainedModel, lm: PreTrainedModel, blocks: str, layers: Sequence[int]) -> None:
    """Refuse layers that a model built from the config would not have: such a draft would not load as it was made."""
    family = lm.config.model_type
    try:
        with torch.device("meta"), no_init_weights():
            built = type(model)(copy.deepcopy(model.config))
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{family}: no config describes layers {list(layers)} alone ({one_line(error)})") from error
    expected, actual = (_described(m.get_submodule(blocks)) for m in (model, built))
    if different := sorted({name for name, _ in expected ^ actual}):
        layer = layers[int(different[0].partition(".")[0])]
        raise InputError(
            f"{family}: layer {layer} would be another kind of layer in a draft of layers {list(layers)} "
            f"({different[0]}): give plan.depth as a list that begins with layer 0 and goes on without a gap"
        )


def _described(blocks: nn.Module) -> set[tuple[str, str]]:
    """What each module of the layers is: its class, its plain attributes, the sizes of its tensors."""
    modules = set()
    for name, module in blocks.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, SIMPLE)}
        plain.pop("training", None)
        sizes = {k: tuple(p.shape) for k, p in module.named_parameters(recurse=False)}
        if name:
            modules.add((name, f"{type(module).__name__} {sorted(plain.items(), key=lambda x: x[0])} {sizes}"))
    return modules
