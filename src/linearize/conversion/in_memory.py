"""`linearize.convert_model`: a loaded model and a plan in, a student over the same weights out; no folder, no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from linearize.conversion.prepare import resolve_plan
from linearize.errors import InputError
from linearize.mixers import LAYERS, MixerConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.probe import probe
from linearize.modeling.truncate import truncate
from linearize.recipes.plan import PlanConfig
from linearize.recipes.schema import Recipe, load_recipe

PlanLike: TypeAlias = PlanConfig | Recipe | Mapping[str, Any] | MixerConfig | Sequence[MixerConfig | None] | str | Path


def convert_model(
    model: PreTrainedModel, plan: PlanLike, *, seed: int = 0, name: str | None = None
) -> LinearizedForCausalLM:
    """A student of a loaded model, untrained, that shares the model's weights; the model stays usable.

    Args:
        model: a causal LM of transformers with softmax attention.
        plan: a `Plan`; a recipe or its name or file, of which the plan is taken; a mapping like a recipe's `plan`; a
            mixer's config, for all layers; or one, or None, for each layer. All layers are converted at once: a
            `schedule` is for training.
        seed: of the new parameters that start at random.
        name: the teacher's in the student's config; None: what the model was loaded from.

    Raises:
        InputError: a model or plan that does not fit, or a plan that needs text to choose layers or start mixers.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"a {type(model).__name__} given: give a loaded causal language model of transformers")
    if isinstance(model, LinearizedForCausalLM):
        raise InputError("the model is a student already: its method convert_layers converts further layers")
    if isinstance(plan, MixerConfig):
        plan = [plan] * model.config.get_text_config().num_hidden_layers
    base, mixers = model, _mixers_of_layers(plan)
    if mixers is None:
        config = _plan_of(plan).model_copy(update={"schedule": None})
        _check_needs_no_text(config)
        layers = config.draft_layers(model.config.get_text_config().num_hidden_layers)
        base = model if layers is None else truncate(model, layers)
        mixers, _, _ = resolve_plan(config, probe(base), base, [])
    for mixer in mixers:
        _check_mixer(mixer)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return LinearizedForCausalLM.from_teacher(base, mixers, teacher_name=name or model.name_or_path or None)


def _mixers_of_layers(plan: PlanLike) -> list[MixerConfig | None] | None:
    """A plan that is one config or None for each layer; None for the other kinds."""
    if isinstance(plan, (PlanConfig, Recipe, Mapping, str, Path)):
        return None
    if not isinstance(plan, Sequence):
        raise InputError(f"plan: a {type(plan).__name__} given; allowed: a plan, a recipe, a mixer's config, or a list")
    mixers: list[Any] = list(plan)
    if wrong := [mixer for mixer in mixers if mixer is not None and not isinstance(mixer, MixerConfig)]:
        raise InputError(f"plan: {wrong[0]!r} given for a layer; allowed: a mixer's config, or None")
    return mixers


def _plan_of(plan: Any) -> PlanConfig:
    if isinstance(plan, PlanConfig):
        return plan
    if isinstance(plan, (str, Path)):
        plan = load_recipe(plan)
    if isinstance(plan, Mapping):
        plan = Recipe.from_data({"plan": dict(plan), "stages": []})
    chosen: PlanConfig = plan.plan
    return chosen


def _check_needs_no_text(plan: PlanConfig) -> None:
    if plan.needs_scores or (plan.heads is not None and plan.heads.needs_scores):
        which = "layers are chosen by sensitivity" if plan.needs_scores else "heads are chosen by their scores"
        raise InputError(f"plan: {which}, which needs text: name them, or use linearize.convert with data")


def _check_mixer(mixer: MixerConfig | None) -> None:
    """Refuse a mixer that could not be loaded again, or that starts from text. Raises InputError."""
    if mixer is None:
        return
    name = str(mixer.name)  # type: ignore[attr-defined]
    if name not in LAYERS or LAYERS[name] is not type(mixer):
        raise InputError(f"plan: {type(mixer).__name__} is not registered: linearize.register_mixer registers it")
    if getattr(mixer.inner, "initialise", None) == "calibrate":
        raise InputError(f"plan: {name} with initialise=calibrate needs text: use linearize.convert, or another start")
