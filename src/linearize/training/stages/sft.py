"""Supervised fine-tuning through trl: next-token loss on the answers of chats, prompt/completion or Alpaca rows."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from linearize.errors import InputError
from linearize.training.data.chat import with_template
from linearize.training.data.documents import Document, tokenize
from linearize.training.data.preferences import cut
from linearize.training.data.sources import read_examples
from linearize.training.dataset_stage import OwnLoopConfig, StageJob
from linearize.training.distributed import current
from linearize.training.loop import StageResult
from linearize.training.stages.trl_loop import TrlTask, pad_token, require_trl, row_length, run_with_trl

LOG = logging.getLogger("linearize")
IGNORED = -100


class SftConfig(OwnLoopConfig):
    """Settings of the stage. The loss is the mean over the answers' tokens of the whole batch.

    A row longer than `length` loses its end; one of whose answers nothing is left is not used. Rows of plain `text`
    count whole.
    """

    name: Literal["sft"] = "sft"
    lr: float = Field(2e-5, gt=0)

    def check_data(self, tokenizer: Any, context: int | None = None) -> None:
        """See `OwnLoopConfig.check_data`."""
        require_trl(self.name)
        self.documents(tokenizer, context)

    def documents(self, tokenizer: Any, context: int | None) -> list[Document]:
        """The rows as tokens, `loss_mask` 1 on answers. Raises InputError for data that cannot be used."""
        tokenizer, length = with_template(tokenizer, self.chat_template), row_length(self, context)
        examples = read_examples(self.data, tokenizer, answer_only=True)
        documents = [cut(document, length) for document in tokenize(examples, tokenizer, answer_only=True)]
        answered = [document for document in documents if any(document.loss_mask[1:])]
        if not answered:
            raise InputError(
                f"data {self.data!r}: no answer is left in {length} tokens a row; raise length or give other data"
            )
        if len(answered) < len(documents):
            LOG.warning("%d of %d rows have no answer within %d tokens and are left out",
                        len(documents) - len(answered), len(documents), length)  # fmt: skip
        return answered

    def run(self, job: StageJob) -> StageResult:
        """See `OwnLoopConfig.run`."""
        require_trl(self.name)
        documents: list[Document] = current().share(lambda: self.documents(job.tokenizer, job.context))
        rows = [
            {
                "input_ids": document.tokens,
                "labels": [
                    t if counts else IGNORED for t, counts in zip(document.tokens, document.loss_mask, strict=True)
                ],
            }
            for document in documents
        ]
        task = TrlTask(
            rows=rows,
            lengths=[len(document) for document in documents],
            digest=hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
            collate=partial(collate, pad=pad_token(job.tokenizer)),
            inputs=dict,
            count=lambda batch: int((batch["labels"][:, 1:] != IGNORED).sum()),
            trainer="SFTTrainer",
            arguments="SFTConfig",
            settings={"packing": False, "loss_type": "nll"},
            metrics=("mean_token_accuracy",),
            needs_reference=False,
        )
        return run_with_trl(self, job, task)


def collate(rows: Sequence[dict[str, Any]], *, pad: int) -> dict[str, Tensor]:
    """Rows padded on the right: `input_ids`, `attention_mask`, `labels`, all `[B, T]`."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        "labels": padded([torch.tensor(row["labels"]) for row in rows], IGNORED),
    }


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """One tensor of rows of unequal length, filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
