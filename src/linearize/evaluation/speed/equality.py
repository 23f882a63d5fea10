"""Is what we time right? Logits through a cache against those of a plain forward over the text, at a small length.

Letters: B rows, T tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.evaluation.speed.reading import feed
from linearize.evaluation.speed.run_config import RunConfig, attending, new_cache
from linearize.modeling import LinearizedForCausalLM

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One way of running a model, compared. `difference` is the largest one of logits, `allowed` what rounding may
    make of it (a share of the logits' standard deviation); `error` where the way does not run at all."""

    model: str
    way: str
    batch: int
    tokens: int
    difference: float | None
    allowed: float | None
    equal: bool
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    @property
    def reason(self) -> str:
        """Why no speed is given, empty when all is right."""
        if self.error:
            return self.error
        if self.equal:
            return ""
        found = "without limit" if self.difference is None else f"by {self.difference:.3g}"
        return f"wrong output: logits differ from a plain forward {found}, allowed {self.allowed:.2g}"


@dataclass(frozen=True)
class Reference:
    """Greedy tokens and their logits from plain forwards; `plain_BT` is the text they continue."""

    plain_BT: Tensor
    new_BN: Tensor
    logits_BNV: Tensor


def reference(model: Any, ids_BT: Tensor, new_tokens: int) -> Reference:
    """Continue greedily, each token from a forward over all of the text without a cache; softmax attention is eager."""
    text_BT, found = ids_BT, []
    with attending(model, "eager"):
        for _ in range(new_tokens):
            found.append(model(input_ids=text_BT, use_cache=False).logits[:, -1])
            text_BT = torch.cat([text_BT, found[-1].argmax(dim=-1, keepdim=True)], dim=1)
    return Reference(ids_BT, text_BT[:, ids_BT.shape[1] :], torch.stack(found, dim=1))


def check_config(name: str, model: PreTrainedModel, config: RunConfig, expected: Reference) -> Check:
    """The same text and tokens through the way's cache, with the text in one piece, and in unequal ones.

    Tokens are equal when at each step the greedy one is the reference's, or as likely there but for rounding.
    """
    batch, length = expected.plain_BT.shape
    allowed = TOLERANCE[model.dtype] * float(expected.logits_BNV.float().std())
    told: dict[str, Any] = {"model": name, "way": str(config), "batch": batch, "tokens": length, "allowed": allowed}
    splits = {(length,), _pieces(length)}
    try:
        with attending(model, config.attention):
            worst = max((_difference(model, config, expected, split) for split in sorted(splits)), key=_badness)
    except Exception as error:  # a way that transformers cannot run with this model is an answer, not the end
        return Check(**told, difference=None, equal=False, error=_told(error))
    return Check(**told, difference=_finite(worst), equal=worst <= allowed)


def _difference(model: PreTrainedModel, config: RunConfig, expected: Reference, split: Sequence[int]) -> float:
    """The largest difference of logits; where a greedy token differs also how much less likely it is."""
    cache = new_cache(config, model, expected.plain_BT.shape[1] + expected.new_BN.shape[1])
    logits_BV = expected.logits_BNV[:, 0]
    for piece_BT in expected.plain_BT.split(list(split), dim=1):
        logits_BV, cache = feed(model, cache, piece_BT)
    worst = torch.zeros((), device=logits_BV.device)
    for step in range(expected.new_BN.shape[1]):
        right_BV = expected.logits_BNV[:, step].float()
        chosen_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        less_likely = right_BV.amax(dim=-1, keepdim=True) - right_BV.gather(1, chosen_B1)
        worst = torch.stack([worst, (logits_BV.float() - right_BV).abs().max(), less_likely.max()]).max()
        if step + 1 < expected.new_BN.shape[1]:
            logits_BV, cache = feed(model, cache, expected.new_BN[:, step, None])
    return float(worst)


def row_difference(one_1V: Tensor, rows_BV: Tensor) -> tuple[float, float]:
    """The largest difference between the logits of one row and those of the same row repeated; and what is allowed."""
    difference = float((rows_BV.float() - one_1V.float()).abs().max())
    return difference, TOLERANCE[one_1V.dtype] * float(one_1V.float().std())


def _pieces(length: int) -> tuple[int, ...]:
    """Unequal pieces of a text, the last one a single token."""
    first = -(-length * 2 // 5)
    second = max(length - first - 1, 0)
    return tuple(size for size in (first, second, length - first - second) if size)


def _badness(difference: float) -> float:
    return float("inf") if difference != difference else difference


def _finite(value: float) -> float | None:
    return value if value - value == 0 else None


def _told(error: Exception) -> str:
    from linearize.errors import one_line

    return f"does not run: {one_line(error)}"


def length_needed(model: Any, wanted: int) -> int:
    """Tokens of the check: as wanted, and more than twice a student's window, so that its linear branch takes part."""
    if not isinstance(model, LinearizedForCausalLM):
        return wanted
    windows = [int(entry.get("window") or 0) for entry in model.config.plan if entry is not None]
    return max(wanted, 2 * max(windows, default=0) + 3)
