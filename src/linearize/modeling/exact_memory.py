"""What a trained student can be given without training: an exact store, and heads that keep their softmax attention."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn

from linearize.errors import InputError
from linearize.mixers.layer_mixer import LayerMixer
from linearize.mixers.retrieval_heads import RetrievalHeads, RetrievalHeadsConfig
from linearize.modeling.config import parse_mixer


def set_store(student: Any, pairs: int) -> None:
    """Let every mixer that can keep so many key-value pairs of each head exact beyond its window (0: none); what was
    learned stays as it is. A cache that was filled before is of no use afterwards.

    Raises:
        InputError: no mixer with a store, a negative number, or a window that a store does not fit.
    """
    configs = {layer: mixer for layer, mixer in enumerate(student.config.mixers()) if mixer is not None}
    able = [layer for layer, config in configs.items() if hasattr(config.inner, "store")]
    if not able:
        names = sorted({str(config.inner.name) for config in configs.values()})
        raise InputError(f"store {pairs}: mixers of this student are {', '.join(names)}, and lolcats alone has one")
    if pairs and any(getattr(configs[layer].inner, "shift", None) == "window" for layer in able):
        warnings.warn(
            f"store {pairs}: this student weighs what left its window on another scale (shift: window, as published), "
            "so a stored pair counts little; students with shift: shared, as window-linear's, find what they store",
            stacklevel=3,
        )
    for layer in able:
        try:
            inner = parse_mixer({**configs[layer].inner.model_dump(), "store": pairs})
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InputError(f"store {pairs} of layer {layer}: {reason}") from error
        entry = configs[layer].with_inner(inner)
        student.config.plan[layer] = entry.model_dump()
        mixer = student.mixers()[layer]
        if isinstance(mixer, RetrievalHeads) and mixer.inner is not None:
            mixer.inner.config = inner
        mixer.config = entry


def keep_heads(student: Any, groups: Mapping[int, Sequence[int]]) -> None:
    """Give key/value groups of converted layers their softmax attention back, `{layer: [group, ...]}`, besides those
    that keep it already; the others keep what they learned. A cache that was filled before is of no use afterwards.

    Raises:
        InputError: a layer without a mixer between the projections, a group that it does not have, or a layer whose
            teacher sees a window only. The student is unchanged then.
    """
    shapes, made = student.config.attention_shapes(), {}
    mixers = student.mixers()
    local = _limited(student)
    for layer, kept in groups.items():
        mixer = mixers.get(layer)
        if mixer is None or isinstance(mixer, LayerMixer) or layer in local:
            between = [i for i, m in mixers.items() if not isinstance(m, LayerMixer) and i not in local]
            raise InputError(f"layer {layer} has no heads to give back: layers that have are {between}")
        before = tuple(mixer.kept) if isinstance(mixer, RetrievalHeads) else ()
        config = mixer.config.inner if before else mixer.config
        new = RetrievalHeadsConfig(groups=tuple(dict.fromkeys((*before, *kept))), mixer=config).build(shapes[layer])
        _copy_heads(mixer, new)
        made[layer] = new
    for layer, new in made.items():
        student.lm.get_submodule(student.config.attention[layer]).mixer = new
        student.config.plan[layer] = new.config.model_dump()


def _limited(student: Any) -> set[int]:
    """The layers whose attention the teacher limits to a window."""
    types = getattr(student.config.teacher_config().get_text_config(), "layer_types", None) or []
    return {layer for layer, kind in enumerate(types) if "sliding" in kind}


def _copy_heads(old: Any, new: RetrievalHeads) -> None:
    """The parameters of the heads that go on with the mixer; those of all heads stay as they are."""
    others: Sequence[int] = range(old.shape.num_kv_heads)
    if isinstance(old, RetrievalHeads):
        others, old = old.others, old.inner
    if new.inner is None:
        return
    per_group = new.shape.group
    heads = [others.index(group) * per_group + r for group in new.others for r in range(per_group)]
    own = dict(new.inner.named_parameters())
    for name, parameter in old.named_parameters():
        values = parameter.data
        if parameter.shape != own[name].shape:
            values = values[heads]
        replaced = nn.Parameter(values.clone(), requires_grad=parameter.requires_grad)
        parent, _, leaf = name.rpartition(".")
        setattr(new.inner.get_submodule(parent), leaf, replaced)
