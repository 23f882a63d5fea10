"""The plan applied to a teacher: first everything is looked at, then everything is changed, or nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from linearize.errors import InputError
from linearize.mixers import AttentionMixer, AttentionShape, LayerMixer, Mixer, MixerConfig
from linearize.mixers.retrieval_heads import RetrievalHeadsConfig
from linearize.modeling.attention import ATTENTION, MixerLayer, parameter_names
from linearize.modeling.io.nf4 import nf4_states
from linearize.modeling.library_internals import set_attention
from linearize.modeling.parallel import is_unit, whole
from linearize.modeling.probe import AttentionSite, attention_configs, check_not_offloaded
from linearize.modeling.projections import attention_weights


def check_plan(
    plan: Sequence[MixerConfig | None], sites: Sequence[AttentionSite], family: str
) -> list[MixerConfig | None]:
    """The plan as it will be applied: a layer that the teacher limits to at most the mixer's window stays as it is.

    Such a layer is linear already, and no mixer would be nearer to it than itself.

    Raises:
        InputError: a plan of another length than the model, or a mixer that takes something from projections which
            cannot be read.
    """
    if len(plan) != len(sites):
        raise InputError(
            f"the plan has {len(plan)} layers, {family} has {len(sites)}: give one mixer (or none) per layer"
        )
    checked = [None if _is_local(mixer, site) else mixer for mixer, site in zip(plan, sites, strict=True)]
    for mixer, site in zip(checked, sites, strict=True):
        if isinstance(mixer, RetrievalHeadsConfig) and site.sliding_window is not None:
            raise InputError(
                f"plan.heads: layer {site.layer} of {family} sees the last {site.sliding_window} tokens only, so no "
                "head of it looks further back: name groups of other layers"
            )
        if mixer is not None and mixer.reads_projections and not site.readable:
            raise InputError(
                f"{mixer.name} cannot start from layer {site.layer} of {family}: its attention sees other queries, "  # type: ignore[attr-defined]
                "keys or values than its projections give, as far as they are known here; use lolcats"
            )
    return checked


def _is_local(mixer: MixerConfig | None, site: AttentionSite) -> bool:
    window = None if mixer is None else getattr(mixer.inner, "window", None)
    return window is not None and site.sliding_window is not None and site.sliding_window <= window


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same tensors: the student's, so that teacher and student cost the memory of one."""
    shared = [*model.parameters(), *model.buffers(), *nf4_states(model)]
    return copy.deepcopy(model, {id(part): part for part in shared})


def install(
    lm: PreTrainedModel,
    plan: Sequence[MixerConfig | None],
    names: Sequence[str],
    shapes: Sequence[AttentionShape],
    *,
    start: bool,
    layers: Sequence[int] | None = None,
) -> None:
    """Put the plan's mixers into `lm` (of `layers`; None: all) and route the modules that stay to them.

    `start`: layer mixers start from the modules they replace; otherwise a checkpoint will fill them.

    Raises:
        InputError: a layer mixer for attention that it cannot start from; `lm` is unchanged then.
    """
    converted = range(len(plan)) if layers is None else layers
    made = {i: _made(lm.get_submodule(names[i]), mixer, shapes[i], start) for i in converted if (mixer := plan[i])}
    routed: dict[int, PreTrainedConfig] = {}
    for i, built in made.items():
        if isinstance(built, LayerMixer):
            lm.set_submodule(names[i], MixerLayer(built, i, parameter_names(type(lm.get_submodule(names[i])).forward)))
        else:
            _route(lm.get_submodule(names[i]), built, routed)
    if all(mixer is not None for mixer in plan):  # no layer needs a T x T mask
        for config in attention_configs(lm):
            set_attention(config, ATTENTION)


def _made(module: nn.Module, config: MixerConfig, shape: AttentionShape, start: bool) -> Mixer:
    """The mixer, started, on the module's device; what is not to stay in fp32 in the module's dtype (that of its
    numbers of 16 bits or more: rounded weights are no dtype to compute in).

    Raises:
        InputError: weights that are offloaded.
    """
    mixer = config.build(shape)
    parameters = list(module.parameters())
    if not parameters:
        return mixer
    check_not_offloaded(module)
    dtype = next((p.dtype for p in parameters if p.is_floating_point() and p.itemsize > 1), None)
    if isinstance(mixer, LayerMixer) and start and mixer.config.initialise != "random":
        with whole(module):
            mixer.start_from(attention_weights(module, shape))
            if is_unit(module):  # its whole weights are gone afterwards: a start may not be a view of them
                for parameter in mixer.parameters():
                    parameter.data = parameter.data.clone()
    return in_dtype(mixer, dtype, parameters[0].device)


def in_dtype(mixer: Mixer, dtype: torch.dtype | None, device: torch.device) -> Mixer:
    """The mixer moved to a device, its parameters in the model's dtype (None: as they are) but for those that stay in
    fp32."""
    for name, parameter in mixer.named_parameters():
        keeps = dtype is None or mixer.fp32_parameters is None or name in mixer.fp32_parameters
        parameter.data = parameter.data.to(device=device, dtype=parameter.dtype if keeps else dtype)
    for buffer in mixer.buffers():
        buffer.data = buffer.data.to(device)
    return mixer


def _route(module: Any, mixer: Mixer, routed: dict[int, PreTrainedConfig]) -> None:
    """Let an attention module call the mixer: its config becomes a copy that names our attention function."""
    old = module.config
    if id(old) not in routed:
        routed[id(old)] = copy.copy(old)
        set_attention(routed[id(old)], ATTENTION)
    module.config = routed[id(old)]
    module.mixer = mixer
    if isinstance(mixer, AttentionMixer) and mixer.needs_keys:
        module.register_forward_pre_hook(_hand_on_hidden, with_kwargs=True)


def _hand_on_hidden(
    _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[object, dict[str, object]]:
    """The module's input as a keyword, which transformers passes on to the attention function."""
    return args, {**kwargs, "mixer_hidden": args[0] if args else kwargs["hidden_states"]}
