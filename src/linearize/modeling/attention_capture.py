"""What a teacher's attention does on some text: what calibrated starts and matrix alignment are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from linearize.mixers.layer_mixer import AttentionSample
from linearize.modeling.forward_call import positions_to_keep
from linearize.modeling.probe import probe, routed
from linearize.ops.layout import Layout
from linearize.ops.softmax import softmax_attention

CAPTURE = "linearize_capture"


def attention_samples(
    teacher: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    layers: Sequence[int],
    sites: Mapping[int, str] | None = None,
) -> dict[int, list[AttentionSample]]:
    """For each of these layers one sample per batch (`input_ids`, `position_ids: [B, T]`); the teacher is unchanged.

    `sites`: names of the attention modules by layer, where they are known.
    """
    samples: dict[int, list[AttentionSample]] = {layer: [] for layer in layers}
    names = {site.layer: site.name for site in probe(teacher)} if sites is None else sites
    sites = {layer: names[layer] for layer in samples}
    for batch in batches:
        for layer, sample in _run(teacher, batch, sites).items():
            samples[layer].append(sample)
    return samples


def calibrate(
    student: Any,
    teacher: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    layers: Sequence[int] | None = None,
) -> None:
    """Calibrate those mixers of a student (of `layers`, None: of all) whose config asks for it.

    Raises:
        InputError: a mixer that has nothing to calibrate.
    """
    mixers = student.mixers()
    if asking := to_calibrate(student, sorted(mixers) if layers is None else layers):
        samples = attention_samples(teacher, batches, asking)
        with torch.no_grad():
            for layer in asking:
                mixers[layer].calibrate(samples[layer])


def to_calibrate(student: Any, layers: Sequence[int]) -> list[int]:
    """Those of these layers whose mixer is calibrated on text."""
    mixers = student.mixers()
    return [
        layer
        for layer in sorted(layers)
        if layer in mixers and getattr(mixers[layer].config, "initialise", None) == "calibrate"
    ]


def _run(teacher: PreTrainedModel, batch: dict[str, Tensor], sites: Mapping[int, str]) -> dict[int, AttentionSample]:
    """One pass with every attention module's work written down."""
    tokens = batch["input_ids"]
    layout = Layout.from_inputs(num_tokens=tokens.shape[1], past=0, position_ids=batch.get("position_ids"))
    inside: dict[nn.Module, dict[str, Any]] = {}
    outside: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        outside[module] = (hidden, output[0] if isinstance(output, tuple) else output)

    modules = {layer: teacher.get_submodule(name) for layer, name in sites.items()}
    hooks = [module.register_forward_hook(after, with_kwargs=True) for module in modules.values()]
    try:
        with torch.no_grad(), routed(teacher, CAPTURE):
            last = positions_to_keep(1, tokens)
            options = {"use_cache": False, "logits_to_keep": last, "linearize_capture": (layout, inside)}
            teacher(input_ids=tokens, position_ids=batch.get("position_ids"), **options)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        layer: AttentionSample(*outside[module], **inside[module], layout=layout) for layer, module in modules.items()
    }


def _capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    linearize_capture: tuple[Layout, dict[nn.Module, dict[str, Any]]] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    assert linearize_capture is not None
    layout, inside = linearize_capture
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    y = softmax_attention(
        query, key, value, scaling=scale, layout=layout, softcap=softcap, sliding_window=sliding_window
    )
    inside[module] = {
        "q_BHTD": query, "k_BGTD": key, "v_BGTV": value, "y_BHTV": y,
        "scaling": scale, "window": sliding_window, "softcap": softcap,
    }  # fmt: skip
    return y.transpose(1, 2), None


AttentionInterface.register(CAPTURE, _capture)
