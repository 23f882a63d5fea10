"""Token by token on the same text: the loss of each model, and how far each is from the reference.

Letters: B rows, T tokens a row, V vocabulary, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.errors import InputError
from linearize.phases import phase

Batch = Mapping[str, Tensor]

IGNORED = -100
LOGITS_BYTES = 2**28  # of all models' logits at once; a larger batch is measured a few rows at a time
SLICE_TOKENS = 1024  # tokens whose fp32 log-probabilities exist at once
MOST_LIKELY = 5  # tokens compared by `top5`

_Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class View:
    """A model to measure, or one branch of it (`branch` is passed to the model only when it is not the default)."""

    model: nn.Module
    branch: str = "both"

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        size: int = self.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        return size

    def logits(self, batch: Batch) -> Tensor:
        """Logits [B, T, V] of packed rows, in the model's dtype and on its device."""
        device = next(self.model.parameters()).device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
        extra = {} if self.branch == "both" else {"branch": self.branch}
        logits_BTV: Tensor = self.model(**inputs, use_cache=False, **extra).logits
        return logits_BTV


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What every counted token says, in the order of the text, on the CPU.

    `positions` [N] are those of the predicting tokens in their documents, `documents` [N] number the documents (the
    segments of a document that was cut count apart), `targets` [N] are the predicted tokens. The others map a view's
    name to an [N] fp32 tensor: `loss` in nats; `kl` is KL(reference||view) in nats; `top1` is 1 where both have the
    same argmax; `top5` is the share of the reference's five most likely tokens that are among the view's own five.
    The reference has only a `loss`.
    """

    positions: Tensor
    documents: Tensor
    targets: Tensor
    loss: dict[str, Tensor]
    kl: dict[str, Tensor]
    top1: dict[str, Tensor]
    top5: dict[str, Tensor]


@torch.no_grad()
def score_batches(
    batches: Iterable[Batch], views: Mapping[str, View], *, reference: str | None = None, rows: int | None = None
) -> TokenScores:
    """One pass over packed batches, all views side by side in eval mode, log-probabilities in fp32.

    `reference` names the view that the others are compared with; `rows` of a batch go through a model at once (None: as
    many as keep the logits small). Raises InputError when the vocabularies differ or no token counts.
    """
    _check_vocabularies(views)
    modes = {id(view.model): (view.model, view.model.training) for view in views.values()}
    for model, _ in modes.values():
        model.eval()
    batches = list(batches)
    total = sum(batch["input_ids"].numel() for batch in batches)
    parts = []
    try:
        with phase("measuring held-out text", total) as advance:
            for part, tokens in _score_all(batches, views, reference, rows):
                parts.append(part)
                advance(tokens)
    finally:
        for model, was_training in modes.values():
            model.train(was_training)
    if not sum(part.positions.numel() for part in parts):
        raise InputError("nothing to measure: no token counts in the held-out text; give more text or a shorter length")
    return _join(parts)


def _check_vocabularies(views: Mapping[str, View]) -> None:
    sizes = {name: view.vocabulary for name, view in views.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"vocabularies differ ({listed}): agreement needs one vocabulary; name the student's own teacher"
        )


def _score_all(
    batches: Iterable[Batch], views: Mapping[str, View], reference: str | None, rows: int | None
) -> Iterator[tuple[TokenScores, int]]:
    documents = 0
    for batch in batches:
        total, length = batch["input_ids"].shape
        row_bytes = length * 4 * sum(view.vocabulary for view in views.values())
        step = rows or max(1, LOGITS_BYTES // row_bytes)
        for start in range(0, total, step):
            some_rows = {name: x[start : start + step] for name, x in batch.items()}
            part, seen = score_rows(some_rows, views, reference)
            part.documents.add_(documents)
            documents += seen
            yield part, some_rows["input_ids"].numel()


def score_rows(batch: Batch, views: Mapping[str, View], reference: str | None) -> tuple[TokenScores, int]:
    """The scores of some rows, documents numbered from 0, and how many documents the rows hold."""
    counts_BT = (batch["labels"][:, 1:] != IGNORED).cpu()
    row_N, column_N = counts_BT.nonzero(as_tuple=True)
    target_N = batch["labels"].cpu()[:, 1:][counts_BT]
    position_BT = batch["position_ids"].cpu()
    document_BT, documents = number_documents(position_BT)
    logits = {name: view.logits(batch) for name, view in views.items()}
    slices = [
        _score_slice({name: x_BTV[row, column] for name, x_BTV in logits.items()}, target, reference)
        for row, column, target in zip(*(x.split(SLICE_TOKENS) for x in (row_N, column_N, target_N)), strict=True)
    ]
    loss, kl, top1, top5 = (_concatenate([one[i] for one in slices]) for i in range(4))
    scores = TokenScores(
        positions=position_BT[row_N, column_N], documents=document_BT[row_N, column_N], targets=target_N,
        loss=loss, kl=kl, top1=top1, top5=top5,
    )  # fmt: skip
    return scores, documents


def _score_slice(
    logits: Mapping[str, Tensor], target_N: Tensor, reference: str | None
) -> tuple[_Named, _Named, _Named, _Named]:
    """Loss, KL, top-1 and top-5 agreement of one slice of tokens, each by view."""
    log_p = {name: x_NV.float().log_softmax(-1) for name, x_NV in logits.items()}
    loss = {name: -x_NV.gather(-1, target_N.to(x_NV.device)[:, None])[:, 0].cpu() for name, x_NV in log_p.items()}
    if reference is None:
        return loss, {}, {}, {}
    ref_NV = log_p.pop(reference)
    others = {name: x_NV.to(ref_NV.device) for name, x_NV in log_p.items()}
    kl = {name: (ref_NV.exp() * (ref_NV - x_NV)).sum(-1).cpu() for name, x_NV in others.items()}
    top1 = {name: (ref_NV.argmax(-1) == x_NV.argmax(-1)).float().cpu() for name, x_NV in others.items()}
    top5 = {name: _overlap(ref_NV, x_NV).cpu() for name, x_NV in others.items()}
    return loss, kl, top1, top5


def _overlap(ref_NV: Tensor, x_NV: Tensor) -> Tensor:
    """Share [N] of the reference's most likely tokens that are among the other's as well."""
    count = min(MOST_LIKELY, ref_NV.shape[-1])
    ref_NK, x_NK = ref_NV.topk(count, dim=-1).indices, x_NV.topk(count, dim=-1).indices
    return (ref_NK[:, :, None] == x_NK[:, None, :]).any(-1).float().mean(-1)


def number_documents(position_BT: Tensor) -> tuple[Tensor, int]:
    """Number the documents of the rows from 0: one starts with a row and wherever the position does not go up by 1."""
    starts_BT = torch.ones_like(position_BT, dtype=torch.bool)
    starts_BT[:, 1:] = position_BT.diff(dim=-1) != 1
    return starts_BT.flatten().cumsum(0).view_as(starts_BT) - 1, int(starts_BT.sum())


def _concatenate(slices: list[_Named]) -> _Named:
    names = slices[0].keys() if slices else ()
    return {name: torch.cat([one[name] for one in slices]) for name in names}


def _join(parts: list[TokenScores]) -> TokenScores:
    parts = [part for part in parts if part.positions.numel()]
    return TokenScores(
        positions=torch.cat([part.positions for part in parts]),
        documents=torch.cat([part.documents for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
        loss=_concatenate([part.loss for part in parts]),
        kl=_concatenate([part.kl for part in parts]),
        top1=_concatenate([part.top1 for part in parts]),
        top5=_concatenate([part.top5 for part in parts]),
    )
