"""Which draft tokens are kept and which token follows them, and the texts of the batch that grow by both.

Greedy decoding, and speculative sampling (2211.17192, algorithm 1; 2302.01318). Letters: B batch, K draft tokens, T
positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def verify_greedy(scores_BTV: Tensor, draft_BK: Tensor) -> tuple[list[int], list[int]]:
    """Keep draft tokens as long as they are the target's argmax.

    `scores_BTV`: the target's scores, T = K + 1: after the last accepted token and after each draft token. Returns the
    number of draft tokens that each row keeps, and the token after them.
    """
    best_BT = scores_BTV.argmax(-1)
    agree_BK = (best_BT[:, :-1] == draft_BK).long()
    kept_B1 = agree_BK.cumprod(1).sum(1, keepdim=True)
    return _lists(kept_B1, best_BT.gather(1, kept_B1))


def verify_sampled(
    p_BTV: Tensor, draft_BK: Tensor, q_BKV: Tensor | None, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Keep draft token x with probability min(1, p(x) / q(x)), so that tokens follow the target's distribution exactly.

    After the first rejection the next token is sampled from the positive part of p - q; after K kept tokens, from p.
    `p_BTV`: the target's probabilities, T = K + 1. `q_BKV`: the probabilities that the draft tokens were drawn from
    (None: the draft was certain, q = 1 at each). Returns the number of draft tokens that each row keeps, and the token
    after them.
    """
    rows, count = draft_BK.shape
    p_draft_BK = p_BTV[:, :-1].gather(2, draft_BK[..., None])[..., 0]
    q_draft_BK = torch.ones_like(p_draft_BK) if q_BKV is None else q_BKV.gather(2, draft_BK[..., None])[..., 0]
    chance_BK = torch.rand(rows, count, generator=generator, device=p_BTV.device, dtype=p_BTV.dtype)
    kept_B1 = (chance_BK * q_draft_BK < p_draft_BK).long().cumprod(1).sum(1, keepdim=True)
    following_BV = _residual(p_BTV, draft_BK, q_BKV, kept_B1)
    return _lists(kept_B1, torch.multinomial(following_BV, 1, generator=generator))


def _residual(p_BTV: Tensor, draft_BK: Tensor, q_BKV: Tensor | None, kept_B1: Tensor) -> Tensor:
    """Return the distribution of the token after `kept_B1` draft tokens, up to a factor: max(0, p - q), or p."""
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


class GrowingTexts:
    """The texts of a batch while they are decoded.

    `texts`: all tokens, without padding, of the rows that go on. `new`: the new tokens of all rows.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_tokens: frozenset[int]) -> None:
        self.texts: list[list[int]] = [list(prompt) for prompt in prompts]
        self.new: list[list[int]] = [[] for _ in prompts]
        self._rows = list(range(len(prompts)))  # the row of the batch that each text is
        self._most, self._stop = max_new_tokens, stop_tokens
        self._ended = [False] * len(self.texts)

    @property
    def tokens_left(self) -> int:
        """The most tokens that any row may still get."""
        return self._most - min(len(self.new[row]) for row in self._rows)

    def extend(
        self, kept: Sequence[int], following: Sequence[int], drafts: Sequence[Sequence[int]], *, alike: bool
    ) -> tuple[list[list[int]], list[int]]:
        """Append kept draft tokens and the token after them.

        A row ends at a stop token or when it is full. `alike`: rows that go on keep as many draft tokens as the least
        of them; the next draft token, which was kept too, is then the token after them, so that nothing of the target's
        distribution changes. Returns the new tokens of each row and the number of draft tokens that it kept.
        """
        rounds = zip(drafts, kept, following, strict=True)
        added = [self._cut(i, [*draft[:count], after]) for i, (draft, count, after) in enumerate(rounds)]
        ends = [self._ends(i, new) for i, new in enumerate(added)]
        if alike and not all(ends):
            least = min(len(new) for new, end in zip(added, ends, strict=True) if not end)
            added = [new if end else new[:least] for new, end in zip(added, ends, strict=True)]
        for i, new in enumerate(added):
            self.texts[i] += new
            self.new[self._rows[i]] += new
        self._ended = ends
        stayed = [min(count, len(new) - (not end)) for count, new, end in zip(kept, added, ends, strict=True)]
        return added, stayed

    def _cut(self, row: int, tokens: list[int]) -> list[int]:
        """Cut new tokens after a stop token and at the row's limit."""
        stop = next((i + 1 for i, token in enumerate(tokens) if token in self._stop), len(tokens))
        return tokens[: min(stop, self._most - len(self.new[self._rows[row]]))]

    def _ends(self, row: int, tokens: list[int]) -> bool:
        return tokens[-1] in self._stop or len(self.new[self._rows[row]]) + len(tokens) >= self._most

    def drop_ended(self) -> list[int]:
        """Drop the rows that have ended; return the places of the others among the rows that went on before."""
        going = [i for i in range(len(self.texts)) if not self._ended[i]]
        self.texts = [self.texts[i] for i in going]
        self._rows = [self._rows[i] for i in going]
        return going
