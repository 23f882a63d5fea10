"""Which guesses stay, and the token after them: greedy, and speculative sampling (2211.17192, algorithm 1; 2302.01318).

Letters: B batch, K guessed tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def verify_greedy(scores_BTV: Tensor, draft_BK: Tensor) -> tuple[list[int], list[int]]:
    """Guesses stay as long as they are the target's argmax.

    `scores_BTV`: the target's, T = K + 1: after the last accepted token and after each guess. Returns how many guesses
    each row keeps and the token after them.
    """
    best_BT = scores_BTV.argmax(-1)
    agree_BK = (best_BT[:, :-1] == draft_BK).long()
    kept_B1 = agree_BK.cumprod(1).sum(1, keepdim=True)
    return _lists(kept_B1, best_BT.gather(1, kept_B1))


def verify_sampled(
    p_BTV: Tensor, draft_BK: Tensor, q_BKV: Tensor | None, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Guess x stays with probability min(1, p(x) / q(x)); after the first that does not, the positive part of p - q
    is sampled, and after K that do, p: tokens follow the target's distribution exactly.

    `p_BTV`: the target's probabilities, T = K + 1. `q_BKV`: those that the guesses were drawn from (None: the guesses
    were certain, q = 1 at each). Returns how many guesses each row keeps and the token after them.
    """
    rows, count = draft_BK.shape
    p_draft_BK = p_BTV[:, :-1].gather(2, draft_BK[..., None])[..., 0]
    q_draft_BK = torch.ones_like(p_draft_BK) if q_BKV is None else q_BKV.gather(2, draft_BK[..., None])[..., 0]
    chance_BK = torch.rand(rows, count, generator=generator, device=p_BTV.device, dtype=p_BTV.dtype)
    kept_B1 = (chance_BK * q_draft_BK < p_draft_BK).long().cumprod(1).sum(1, keepdim=True)
    following_BV = _residual(p_BTV, draft_BK, q_BKV, kept_B1)
    return _lists(kept_B1, torch.multinomial(following_BV, 1, generator=generator))


def _residual(p_BTV: Tensor, draft_BK: Tensor, q_BKV: Tensor | None, kept_B1: Tensor) -> Tensor:
    """The distribution of the token after the `kept_B1` guesses, up to a factor: max(0, p - q), or p after them all."""
    count = draft_BK.shape[1]
    index = kept_B1[..., None].expand(-1, -1, p_BTV.shape[-1])
    p_BV = p_BTV.gather(1, index)[:, 0]
    if count == 0:
        return p_BV
    last_B1 = kept_B1.clamp(max=count - 1)
    if q_BKV is None:
        left_BV = p_BV.scatter(1, draft_BK.gather(1, last_B1), 0.0)
    else:
        left_BV = (p_BV - q_BKV.gather(1, index.clamp(max=count - 1))[:, 0]).clamp(min=0)
    all_kept_B1 = kept_B1 == count
    nothing_left_B1 = left_BV.sum(-1, keepdim=True) <= 0  # p = q up to rounding: a rejection was rounding too
    return torch.where(all_kept_B1 | nothing_left_B1, p_BV, left_BV)


def _lists(kept_B1: Tensor, following_B1: Tensor) -> tuple[list[int], list[int]]:
    both: list[list[int]] = torch.cat([kept_B1, following_B1], dim=1).tolist()  # the one wait for the device
    return [kept for kept, _ in both], [following for _, following in both]
