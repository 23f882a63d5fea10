"""What distillation minimises: a divergence from a teacher plus cross-entropy, with the logits of a slice of tokens at
a time.

Letters: N tokens that count, n tokens of a slice, M model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.training.config import Batch, LossSum
from linearize.training.stages.chunked_logits import Readout, sliced_loss
from linearize.training.stages.losses import Divergence, counted, divergence


def distillation_loss(
    student: Readout,
    teacher: Readout | None,
    batch: Batch,
    *,
    kl: float,
    ce: float,
    kind: Divergence = "forward",
    temperature: float = 1.0,
) -> LossSum:
    """`kl` times the divergence (`losses.divergence`) plus `ce` times the next token's cross-entropy, nats, summed over
    the tokens whose next token counts.

    `teacher`: None only with `kl` 0. Where the two pad their vocabulary to unequal sizes, the divergence is over the
    tokens that both have.
    """
    live = counted(batch["labels"])
    labels_N = batch["labels"].roll(-1, 1)[live]
    teacher_NM = _teacher_hidden(teacher, batch, live) if kl else None
    student_NM = student.hidden(batch)[live]

    def loss(logits_nV: Tensor, part: slice) -> Tensor:
        total = logits_nV.new_zeros((), dtype=torch.float32)
        if ce:
            total = total + ce * F.cross_entropy(logits_nV.float(), labels_N[part], reduction="sum")
        if teacher is not None and teacher_NM is not None:
            with torch.no_grad():
                target_nV = teacher.logits(teacher_NM[part])
            shared = min(target_nV.shape[-1], logits_nV.shape[-1])
            total = total + kl * divergence(target_nV[:, :shared], logits_nV[:, :shared], kind, temperature=temperature)
        return total

    return LossSum(sliced_loss(student, student_NM, loss), float(live.sum()))


@torch.no_grad()
def _teacher_hidden(teacher: Readout | None, batch: Batch, live_BT: Tensor) -> Tensor:
    assert teacher is not None, "a divergence needs a teacher"
    return teacher.hidden(batch)[live_BT]
