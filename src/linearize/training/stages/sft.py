"""Supervised fine-tuning: next-token loss on the answers of chats, prompt/completion or Alpaca rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.training.config import Batch, LossSum, ParameterGroup, StageRun
from linearize.training.data.chat import with_template
from linearize.training.data.documents import Document, tokenize
from linearize.training.data.preferences import cut
from linearize.training.data.sources import read_examples
from linearize.training.dataset_stage import DatasetStageConfig, padded, until_last_label
from linearize.training.stages.chunked_logits import SplitModel
from linearize.training.stages.losses import answer_loss
from linearize.training.student_run import LogitsRun

LOG = logging.getLogger("linearize")


class SftConfig(DatasetStageConfig):
    """Settings of the stage. The loss is the mean over the answers' tokens of the whole batch.

    A row longer than `length` loses its end; one of whose answers nothing is left is not used. Rows of plain `text`
    count whole.
    """

    name: Literal["sft"] = "sft"
    lr: float = Field(2e-5, gt=0)

    def rows(self, tokenizer: PreTrainedTokenizerBase, context: int | None) -> list[Document]:
        """The rows as tokens, `loss_mask` 1 on answers. Raises InputError for data that cannot be used."""
        tokenizer, length = with_template(tokenizer, self.chat_template), self.row_length(context)
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

    def collate(self, rows: Sequence[Document], pad: int) -> Batch:
        """One document a row."""
        return padded(rows, pad)

    def build(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> StageRun:
        """The stage over a student; of the teacher only the tensors that both share matter."""
        return Sft(student, self.trained_parameters(student, teacher))


class Sft(LogitsRun):
    """The running stage."""

    def __init__(self, student: LinearizedForCausalLM, trained: ParameterGroup) -> None:
        super().__init__(student, trained)
        self.split = SplitModel(student)

    def loss(self, batch: Batch) -> LossSum:
        """Next-token cross-entropy, summed over the answers' tokens."""
        return answer_loss(self.split, until_last_label(batch))
