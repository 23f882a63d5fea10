"""Losses on logits, as sums over the tokens that count; those of training hold the logits of a slice of tokens at a
time.

Letters: B batch, T tokens, V vocabulary, M model width, N tokens that count, n tokens of a slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from linearize.ops.blocking import alike, device_kind
from linearize.ops.window_linear import Branch
from linearize.training.config import Batch, LossSum
from linearize.training.stages.chunked_logits import SplitModel, slice_tokens, sliced_loss

Divergence = Literal["forward", "reverse", "jsd"]
CACHED = 2**18  # logits whose softmaxes a core's caches hold, a few times over
EVERYTHING: Mapping[int, Branch] = MappingProxyType({})  # no layer is left with one branch


def counted(labels_BT: Tensor) -> Tensor:
    """Tokens whose next token counts, `[B, T]` bool: all but padding and the last token of each document."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=-100) != -100


def answer_loss(split: SplitModel, batch: Batch) -> LossSum:
    """Cross-entropy of the labels, nats, summed over those that are not -100, with the number of them that are the
    model's first choice (`mean_token_accuracy` once divided)."""
    live_BT = counted(batch["labels"])
    labels_N = batch["labels"].roll(-1, 1)[live_BT]
    correct = torch.zeros((), device=labels_N.device)

    def cross_entropy(logits_nV: Tensor, part: slice) -> Tensor:
        correct.add_((logits_nV.detach().argmax(-1) == labels_N[part]).sum())
        return F.cross_entropy(logits_nV.float(), labels_N[part], reduction="sum")

    total = sliced_loss(split, split.hidden(batch)[live_BT], cross_entropy)
    return LossSum(total, float(live_BT.sum()), {"mean_token_accuracy": float(correct)})


def answer_log_probs(split: SplitModel, batch: Batch) -> Tensor:
    """The log-probability of each row's labels that are not -100, nats, summed over the row: `[B]`.

    With gradients the logits of a slice are made once more in the backward pass, so that one slice of them exists.
    """
    live_BT = counted(batch["labels"])
    labels_N = batch["labels"].roll(-1, 1)[live_BT]
    hidden_NM = split.hidden(batch)[live_BT]

    def log_probs(hidden_nM: Tensor, labels_n: Tensor) -> Tensor:
        return -F.cross_entropy(split.logits(hidden_nM).float(), labels_n, reduction="none")

    size = slice_tokens(split.vocabulary, hidden_NM)
    parts = [
        checkpoint(log_probs, hidden_nM, labels_n, use_reentrant=False, preserve_rng_state=False)
        for hidden_nM, labels_n in zip(hidden_NM.split(size), labels_N.split(size), strict=True)
    ]
    log_probs_N = torch.cat(parts)
    return log_probs_N.new_zeros(live_BT.shape).masked_scatter(live_BT, log_probs_N).sum(1)


def distillation_loss(
    student: SplitModel,
    teacher: SplitModel | None,
    batch: Batch,
    *,
    kl: float,
    ce: float,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    branch: Mapping[int, Branch] = EVERYTHING,
) -> LossSum:
    """`kl` times the divergence (see `divergence`) plus `ce` times the next token's cross-entropy, nats, summed over
    the tokens whose next token counts.

    `branch`: the one branch that the student's mixers run, by layer; those left out run both.
    `teacher`: None only with `kl` 0. Where the two pad their vocabulary to unequal sizes, the divergence is over the
    tokens that both have.
    """
    live = counted(batch["labels"])
    labels_N = batch["labels"].roll(-1, 1)[live]
    teacher_NM = _teacher_hidden(teacher, batch, live) if kl else None
    student_NM = student.hidden(batch, **({"branch": dict(branch)} if branch else {}))[live]

    def loss(logits_nV: Tensor, part: slice) -> Tensor:
        total = logits_nV.new_zeros((), dtype=torch.float32)
        if ce:
            total = total + ce * F.cross_entropy(logits_nV.float(), labels_N[part], reduction="sum")
        if teacher is not None and teacher_NM is not None:
            with torch.no_grad():
                target_nV = teacher.logits(teacher_NM[part])
            target_nV, logits_nV = _shared(target_nV, logits_nV)
            total = total + kl * divergence(target_nV, logits_nV, kind, temperature=temperature)
        return total

    return LossSum(sliced_loss(student, student_NM, loss), float(live.sum()))


def _shared(target_NV: Tensor, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that both vocabularies have. Where that is all, nothing is cut: the gradient of a cut is a copy."""
    shared = min(target_NV.shape[-1], logits_NV.shape[-1])
    target_NV, logits_NV = (x if x.shape[-1] == shared else x[:, :shared] for x in (target_NV, logits_NV))
    return target_NV, logits_NV


@torch.no_grad()
def _teacher_hidden(teacher: SplitModel | None, batch: Batch, live_BT: Tensor) -> Tensor:
    assert teacher is not None, "a divergence needs a teacher"
    return teacher.hidden(batch)[live_BT]


def divergence(
    teacher_NV: Tensor, student_NV: Tensor, kind: Divergence = "forward", *, temperature: float = 1.0
) -> Tensor:
    """How far the student's distribution of the next token is from the teacher's, nats, summed over tokens.

    `forward`: KL(teacher||student). `reverse`: KL(student||teacher). `jsd`: the mean of both distributions' KL to their
    midpoint (Jensen-Shannon, at most log 2; 2306.13649, section 2, with beta 1/2). Softmaxes are at `temperature`, and
    the result is times its square, so that gradients keep their size (1503.02531, section 2).
    """
    if kind == "forward":
        forward: Tensor = _ForwardKL.apply(teacher_NV, student_NV, temperature)
        return forward
    p, q = (_log_probs(logits, temperature) for logits in (teacher_NV, student_NV))
    if kind == "reverse":
        total = _kl(q, p)
    else:
        middle = torch.logaddexp(p, q) - math.log(2)
        total = 0.5 * (_kl(p, middle) + _kl(q, middle))
    return total * temperature**2


def _log_probs(logits_NV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at a temperature, fp32."""
    logits_NV = logits_NV.float()
    return (logits_NV if temperature == 1 else logits_NV / temperature).log_softmax(-1)


class _ForwardKL(torch.autograd.Function):
    """temperature^2 KL(teacher||student), summed over tokens. Its gradient, temperature (q - p), is made with it, since
    passes over tokens times vocabulary are what a distillation step of a small model waits for: on a CPU a few tokens
    at a time, so that all but the logits and the gradient stays in the caches. The teacher gets no gradient."""

    @staticmethod
    def forward(ctx: Any, teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
        parts = _token_blocks(student_NV)
        gradient = torch.empty_like(student_NV, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        totals = student_NV.new_empty(len(parts), dtype=torch.float32)
        for number, part in enumerate(alike(parts)):
            p, q = _log_probs(teacher_NV[part], temperature), _log_probs(student_NV[part], temperature)
            weights = p.exp()
            totals[number] = p.sub_(q).mul_(weights).sum()
            if gradient is not None:
                torch.sub(q.exp_(), weights, out=gradient[part])
        if gradient is not None:
            ctx.gradient = gradient if temperature == 1 else gradient.mul_(temperature)
            ctx.dtype = student_NV.dtype
        return totals.sum() * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[None, Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None  # it is scaled in place: a second backward pass fails
        if not (factor.is_cpu and factor == 1):
            gradient.mul_(factor)
        return None, gradient.to(ctx.dtype), None


def _token_blocks(logits_NV: Tensor) -> list[slice]:
    """Tokens to take at a time, in parts of equal size: on a CPU at most `CACHED` logits for each thread, else all."""
    tokens, vocabulary = logits_NV.shape
    cached = torch.get_num_threads() * CACHED if device_kind(logits_NV) == "cpu" else logits_NV.numel()
    parts = -(-tokens // max(1, cached // vocabulary))
    size = -(-tokens // max(1, parts))
    return [slice(number * size, (number + 1) * size) for number in range(parts) if number * size < tokens]


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p||q) of log-probabilities."""
    return F.kl_div(q_NV, p_NV, log_target=True, reduction="sum")


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> LossSum:
    """Cross-entropy of the next token, nats, summed over labels that are not -100."""
    targets = labels_BT[:, 1:]
    total = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return LossSum(total, float((targets != -100).sum()))


def kl_divergence(teacher_BTV: Tensor, student_BTV: Tensor, labels_BT: Tensor) -> LossSum:
    """KL(teacher||student), nats, summed over the tokens whose next token counts; softmaxes exist for a slice of
    tokens at a time."""
    live = counted(labels_BT)
    teacher_NV, student_NV = teacher_BTV[live], student_BTV[live]
    size = slice_tokens(student_NV.shape[1], student_NV)
    total = student_BTV.new_zeros((), dtype=torch.float32)
    for p, q in zip(teacher_NV.split(size), student_NV.split(size), strict=True):
        total = total + divergence(p, q)
    return LossSum(total, float(live.sum()))
