"""What the tests of static steps share: models, a loop that accepts by row, and all memory of a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from models import left_padded, mixer, student_of, text, tiny
from speculation_cases import endless
from torch import Tensor

from linearize.mixers import MIXERS
from linearize.modeling.static.step import StaticStep
from linearize.ops import tensors

LENGTHS = [11, 2, 7]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in MIXERS},
    "lolcats-sliding-sinks": ("lolcats", {"window_shape": "sliding", "num_sinks": 2}),
    "lolcats-store": ("lolcats", {"num_sinks": 1, "store": 5}),
    "lolcats-linear": ("lolcats", {"window": 0, "affine": True}),
    "sliding_window-terraced-sinks": ("sliding_window", {"window_shape": "terraced", "num_sinks": 3}),
}


def hybrid(variant: str) -> Any:
    """A student with a mixer, a kept softmax layer, and the mixer again."""
    name, settings = VARIANTS[variant]
    made = mixer(name, **settings)
    return endless(student_of(tiny("llama", attention="sdpa"), [made, None, made]))


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of different lengths behind padding, and their mask."""
    return left_padded(text(3, max(LENGTHS)), LENGTHS)


def greedy(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """What transformers' own greedy decoding gives, `[B, count]`."""
    out: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return out[:, ids.shape[1] :]


def drafts(expected: Tensor, seed: int, widest: int) -> Iterator[tuple[int, Tensor]]:
    """Widths, and whether each draft token of a round is right, `[B, T]`, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        width = int(torch.randint(1, widest + 1, (1,), generator=generator))
        yield width, torch.rand(expected.shape[0], width, generator=generator) < 0.7


def logits_after(model: Any, ids: Tensor, mask: Tensor, expected: Tensor) -> list[Tensor]:
    """Of each row, the logits after its prompt and after each of its expected tokens, read at once and alone."""
    logits = []
    for row, live, more in zip(ids, mask.bool(), expected, strict=True):
        whole = torch.cat([row[live], more])[None]
        with torch.no_grad():
            logits.append(model(whole).logits[0, int(live.sum()) - 1 :])
    return logits


def verified(
    step: StaticStep, ids: Tensor, mask: Tensor, expected: Tensor, seed: int = 0, tolerance: float = 1e-3
) -> set[tuple[int, ...]]:
    """Verify right and wrong draft tokens, rows keeping different numbers of them; compare tokens and logits.

    Returns the combinations of widths and kept tokens that occurred.
    """
    rows, count = expected.shape
    due_logits = logits_after(step.model, ids, mask, expected)
    padded = torch.cat([expected, torch.full((rows, step.width + 1), 5)], dim=1)
    assert torch.equal(step.prefill(ids, mask)[:, -1].argmax(-1), expected[:, 0])
    at, kept, seen = [0] * rows, [0] * rows, set()
    for width, right in drafts(expected, seed, step.width):
        truth = torch.stack([padded[row, start : start + width] for row, start in enumerate(at)])
        right[:, 0] = True  # the first token is the target's own
        tokens = torch.where(right, truth, (truth + 1) % 50 + 3)
        logits = step.step(tokens, kept)
        best = logits.argmax(-1)
        kept = right.long().cumprod(1).sum(1).tolist()
        seen.add((width, *kept))
        for row, (start, stays) in enumerate(zip(at, kept, strict=True)):
            due = expected[row, start + 1 : start + 1 + stays]
            assert torch.equal(best[row, : len(due)], due), f"row {row} from token {start} on"
            exact = due_logits[row][start + 1 : start + 1 + len(due)]
            torch.testing.assert_close(logits[row, : len(due)], exact, rtol=0, atol=tolerance)
        at = [min(start + stays, count) for start, stays in zip(at, kept, strict=True)]
        if min(at) >= count - 1:
            return seen
    raise AssertionError


def memory(step: StaticStep) -> list[Tensor]:
    """All memory that a step keeps between calls."""
    memory = [step.start_B, step.held_1, step.kept_B]
    for layer in step.cache.layers:
        memory += [layer.keys, layer.values] if layer.keys is not None else [*tensors(layer.state), *layer.raw]
    return memory
