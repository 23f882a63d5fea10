"""Window dropout: in some steps a layer has its linear branch alone, so that the window cannot carry everything
(2510.05901, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM


def _as_parts(value: object) -> object:
    return (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


WindowDropout = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], ...],
    BeforeValidator(_as_parts),
    Field(description="probability that a layer runs its linear branch alone in a step; a list: for equal parts of the "
                      "stage in turn, like [0.9, 0.75, 0.5]; []: never"),
]  # fmt: skip


def check_window_dropout(parts: Sequence[float], student: LinearizedForCausalLM) -> None:
    """Raise `InputError` for dropout without a layer that has both a window and a linear branch."""
    if any(parts) and not two_branch_layers(student):
        names = sorted({str(mixer.config.name) for mixer in student.mixers().values()})  # type: ignore[attr-defined]
        raise InputError(
            f"window_dropout {list(parts)} needs mixers with a window and a linear branch (lolcats, gla), and this "
            f"student has {', '.join(names) or 'none'}: leave it out"
        )


def two_branch_layers(student: LinearizedForCausalLM) -> list[int]:
    """The layers whose mixer has a window and a linear branch."""
    return [layer for layer, mixer in sorted(student.mixers().items()) if mixer.config.has_two_branches]


def draw_branches(parts: Sequence[float], layers: Sequence[int], progress: float) -> dict[int, Literal["linear"]]:
    """The layers whose window is dropped in a step, drawn from torch's generator.

    `progress`: the share of the stage's steps that are done; it says which of the `parts` holds.
    """
    if not parts:
        return {}
    probability = parts[min(int(progress * len(parts)), len(parts) - 1)]
    dropped = (torch.rand(len(layers)) < probability).tolist()
    return {layer: "linear" for layer, drop in zip(layers, dropped, strict=True) if drop}
