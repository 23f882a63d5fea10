"""Losses on logits, as sums over the tokens that count.

Letters: B batch, T tokens, V vocabulary, N tokens that count.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.training.config import LossSum

Divergence = Literal["forward", "reverse", "jsd"]
SLICE_NUMBERS = 2**24
"""Logits of at most so many numbers exist at a time (64 MiB in fp32), a few times over inside a loss."""


def slice_tokens(vocabulary: int) -> int:
    """Tokens whose logits exist at a time."""
    return max(1, SLICE_NUMBERS // vocabulary)


def counted(labels_BT: Tensor) -> Tensor:
    """Tokens whose next token counts, `[B, T]` bool: all but padding and the last token of each document."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=-100) != -100


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> LossSum:
    """Cross-entropy of the next token, nats, summed over labels that are not -100."""
    wanted = labels_BT[:, 1:]
    total = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=-100, reduction="sum"
    )
    return LossSum(total, float((wanted != -100).sum()))


def kl_divergence(teacher_BTV: Tensor, student_BTV: Tensor, labels_BT: Tensor) -> LossSum:
    """KL(teacher||student), nats, summed over the tokens whose next token counts; softmaxes exist for a slice of
    tokens at a time."""
    live = counted(labels_BT)
    teacher_NV, student_NV = teacher_BTV[live], student_BTV[live]
    size = slice_tokens(student_NV.shape[1])
    total = student_BTV.new_zeros((), dtype=torch.float32)
    for p, q in zip(teacher_NV.split(size), student_NV.split(size), strict=True):
        total = total + divergence(p, q)
    return LossSum(total, float(live.sum()))


def divergence(
    teacher_NV: Tensor, student_NV: Tensor, kind: Divergence = "forward", *, temperature: float = 1.0
) -> Tensor:
    """How far the student's distribution of the next token is from the teacher's, nats, summed over tokens.

    `forward`: KL(teacher||student). `reverse`: KL(student||teacher). `jsd`: the mean of both distributions' KL to their
    midpoint (Jensen-Shannon, at most log 2; 2306.13649, section 2, with beta 1/2). Softmaxes are at `temperature`, and
    the result is times its square, so that gradients keep their size (1503.02531, section 2).
    """
    p, q = ((logits.float() / temperature).log_softmax(-1) for logits in (teacher_NV, student_NV))
    if kind == "forward":
        total = _kl(p, q)
    elif kind == "reverse":
        total = _kl(q, p)
    else:
        middle = torch.logaddexp(p, q) - math.log(2)
        total = 0.5 * (_kl(p, middle) + _kl(q, middle))
    return total * temperature**2


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p||q) of log-probabilities."""
    return F.kl_div(q_NV, p_NV, log_target=True, reduction="sum")
