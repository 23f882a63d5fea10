"""A toy stage for the tests of the loop: a small language model with dropout, of which only some parameters train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.training.config import Batch, LossSum, ParameterGroup, StageConfig, StageRun

VOCABULARY, WIDTH, LENGTH, BATCH = 11, 7, 5, 8
ROWS = 29
IGNORED = -100


class ToyModel(nn.Module):
    """Predicts the next token from the current one."""

    def __init__(self, *, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.hidden = nn.Linear(WIDTH, 13, dtype=dtype)
        self.dropout = dropout
        self.head = nn.Linear(13, VOCABULARY, dtype=dtype)

    def forward(self, input_ids: Tensor, *, dropout: bool) -> Tensor:
        hidden = torch.tanh(self.hidden(self.embedding(input_ids)))
        return self.head(F.dropout(hidden, self.dropout, training=dropout))


class ToyRun(StageRun):
    """Trains `hidden` and `head`, the head at a third of the learning rate; the embedding stays."""

    def __init__(self, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = ToyModel(dropout=dropout, dtype=dtype)
        self.finished = self.forwards = 0
        self.before_loss: Callable[[int], None] = lambda forwards: None

    def parameter_groups(self) -> list[ParameterGroup]:
        named = dict(self.model.named_parameters())
        hidden = {name: value for name, value in named.items() if name.startswith("hidden")}
        head = {name: value for name, value in named.items() if name.startswith("head")}
        return [ParameterGroup(hidden), ParameterGroup(head, lr_scale=1 / 3)]

    def loss(self, batch: Batch) -> LossSum:
        self.forwards += 1
        self.before_loss(self.forwards)
        return self._loss(batch, dropout=True)

    def heldout_loss(self, batch: Batch) -> LossSum:
        return self._loss(batch, dropout=False)

    def finish(self) -> None:
        self.finished += 1

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def _loss(self, batch: Batch, *, dropout: bool) -> LossSum:
        logits, labels = self.model(batch["input_ids"], dropout=dropout)[:, :-1], batch["labels"][:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return LossSum(total, (labels != IGNORED).sum())


def toy_rows(num_rows: int, seed: int) -> Batch:
    """Rows of a noisy cycle; the k-th row counts at its first `k % LENGTH` labels only, so counts differ widely."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY, (num_rows, 1), generator=generator)
    noise = torch.randint(2, (num_rows, LENGTH), generator=generator)
    input_ids = (start + 3 * torch.arange(LENGTH) + noise) % VOCABULARY
    masked = torch.arange(LENGTH)[None] > torch.arange(num_rows)[:, None] % LENGTH
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(masked, IGNORED)}


def toy_batches(step: int, *, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """Batches from `step` on; step k is the same batch wherever the iterator starts."""
    rows, share = toy_rows(ROWS, seed=1), BATCH // ranks
    for k in count(step):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1000 + k))[:BATCH]
        mine = order[rank * share : (rank + 1) * share]
        yield {key: value[mine] for key, value in rows.items()}


def toy_heldout() -> list[Batch]:
    """Two batches of unequal size."""
    rows = toy_rows(13, seed=2)
    return [{key: value[:9] for key, value in rows.items()}, {key: value[9:] for key, value in rows.items()}]


def toy_config(*, steps: int = 23, **settings: Any) -> StageConfig:
    """A stage of so many steps, evaluated every four."""
    defaults: dict[str, Any] = {"lr": 0.03, "evaluate_every": 4, "warmup": 3, "weight_decay": 0.1, "batch": BATCH}
    tokens = steps * BATCH * LENGTH - 7  # the last step is not needed in full
    return StageConfig(name="toy", tokens=tokens, **defaults | settings)
