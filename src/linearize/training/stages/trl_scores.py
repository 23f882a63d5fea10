"""What trl's trainers ask of a model in place of logits: log-probabilities of the labels.

trl runs the base model and the output embedding by itself to save memory. A student's base model does not work alone
(its mixers need to know where documents and padding are), and families differ in what they do to logits, so the
student's own forward is used, with logits only where some row has a label.

Letters: B batch, T tokens, K columns with a label, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.modeling import LinearizedForCausalLM

IGNORED = -100


@dataclass(eq=False)
class Scores:
    """Of each next token `[B, T - 1]`, zero where its label is -100; the names are those that trl's trainers read.

    `log_probs` in nats, with its graph; `loss`: their negative sum over the labels' number; the rest without graph.
    """

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    label_mask: Tensor
    log_sum_sq_probs: None = None
    aux_loss: None = None


@contextlib.contextmanager
def scoring(model: LinearizedForCausalLM) -> Iterator[None]:
    """Inside, `model(..., labels=, fused_lm_head=True)` gives `Scores`; afterwards the model's forward is its own."""
    own = type(model).forward

    def forward(*, fused_lm_head: bool = False, labels: Tensor | None = None, **inputs: Any) -> Any:
        if not fused_lm_head:
            return own(model, labels=labels, **inputs)
        assert labels is not None
        return score(lambda **more: own(model, **inputs, **more).logits, labels)

    model.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.forward


def score(logits_of: Callable[..., Tensor], labels_BT: Tensor) -> Scores:
    """The scores of labels (not shifted); `logits_of(logits_to_keep=[K])` gives logits `[B, K, V]` of those columns."""
    wanted_BT = labels_BT[:, 1:]
    mask_BT = wanted_BT != IGNORED
    columns_K = mask_BT.any(0).nonzero()[:, 0]
    if len(columns_K) == 0:
        columns_K = torch.zeros(1, dtype=torch.long, device=labels_BT.device)
    logits_BKV = logits_of(logits_to_keep=columns_K).float()
    wanted_BK, mask_BK = wanted_BT[:, columns_K].clamp(min=0), mask_BT[:, columns_K]
    norm_BK = logits_BKV.logsumexp(-1)
    log_probs_BK = logits_BKV.gather(-1, wanted_BK[..., None])[..., 0] - norm_BK

    def spread(values_BK: Tensor) -> Tensor:
        whole_BT = values_BK.new_zeros(wanted_BT.shape)
        return whole_BT.index_copy(1, columns_K, values_BK.masked_fill(~mask_BK, 0))

    with torch.no_grad():
        entropy_BK = norm_BK - ((logits_BKV - norm_BK[..., None]).exp() * logits_BKV).sum(-1)
        mean_BK, top1_BK = logits_BKV.mean(-1), logits_BKV.argmax(-1) == wanted_BK
    log_probs_BT = spread(log_probs_BK)
    return Scores(
        loss=-log_probs_BT.sum() / mask_BT.sum().clamp(min=1),
        log_probs=log_probs_BT,
        entropy=spread(entropy_BK),
        mean_logits=spread(mean_BK),
        is_top1=spread(top1_BK),
        label_mask=mask_BT,
    )
