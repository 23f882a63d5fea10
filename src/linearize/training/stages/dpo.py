"""Direct preference optimization through trl (Rafailov et al., 2305.18290, equation 7), always against an explicit
reference: a frozen copy of the student as the stage finds it.

The loss of a pair is -log sigmoid(margin), with margin = beta * (r(chosen) - r(rejected)) and r = log p - log p_ref of
an answer given its prompt, summed over the answer's tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from linearize.training.data.chat import with_template
from linearize.training.data.preferences import PreferencePair, read_preferences, tokenize_preferences
from linearize.training.dataset_stage import OwnLoopConfig, StageJob
from linearize.training.distributed import current
from linearize.training.loop import StageResult
from linearize.training.stages.sft import padded
from linearize.training.stages.trl_loop import TrlTask, pad_token, require_trl, row_length, run_with_trl

METRICS = (
    "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"
)  # fmt: skip


class DpoConfig(OwnLoopConfig):
    """Settings of the stage. A row of `batch` is a pair; `length` holds for each of its two texts.

    `beta`: how dearly distance from the reference is paid; The Mamba in the Llama (2408.15237) takes 0.01. `loss`: the
    published one (`sigmoid`), `ipo` (2310.12036) or `hinge`.
    """

    name: Literal["dpo"] = "dpo"
    lr: float = Field(5e-7, gt=0)
    beta: float = Field(0.1, gt=0)
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"

    def check_data(self, tokenizer: Any, context: int | None = None) -> None:
        """See `OwnLoopConfig.check_data`."""
        require_trl(self.name)
        self.pairs(tokenizer, context)

    def pairs(self, tokenizer: Any, context: int | None) -> list[PreferencePair]:
        """The preferences as tokens. Raises InputError for data that cannot be used."""
        tokenizer, length = with_template(tokenizer, self.chat_template), row_length(self, context)
        return tokenize_preferences(read_preferences(self.data, tokenizer), tokenizer, length)

    def run(self, job: StageJob) -> StageResult:
        """See `OwnLoopConfig.run`."""
        require_trl(self.name)
        pairs: list[PreferencePair] = current().share(lambda: self.pairs(job.tokenizer, job.context))
        rows = [
            {
                "chosen": pair.chosen.tokens, "chosen_mask": pair.chosen.loss_mask,
                "rejected": pair.rejected.tokens, "rejected_mask": pair.rejected.loss_mask,
            }
            for pair in pairs
        ]  # fmt: skip
        task = TrlTask(
            rows=rows,
            lengths=[len(pair) for pair in pairs],
            digest=hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
            collate=partial(collate, pad=pad_token(job.tokenizer)),
            inputs=chosen_first,
            count=lambda batch: len(batch["input_ids"]),
            trainer="DPOTrainer",
            arguments="DPOConfig",
            settings={"beta": self.beta, "loss_type": [self.loss], "precompute_ref_log_probs": False},
            metrics=METRICS,
            needs_reference=True,
        )
        return run_with_trl(self, job, task)


def collate(rows: Sequence[dict[str, Any]], *, pad: int) -> dict[str, Tensor]:
    """Of each pair the chosen text and the rejected one, padded on the right: `input_ids`, `attention_mask`,
    `completion_mask` (1 on answers), all `[B, 2, T]`."""
    ids = [torch.tensor(row[side]) for row in rows for side in ("chosen", "rejected")]
    masks = [torch.tensor(row[f"{side}_mask"]) for row in rows for side in ("chosen", "rejected")]
    batch = {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        "completion_mask": padded(masks, 0),
    }
    return {name: tensor.unflatten(0, (-1, 2)) for name, tensor in batch.items()}


def chosen_first(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All chosen texts of a batch, then all rejected ones: `[B, 2, T]` to `[2 B, T]`."""
    return {name: tensor.transpose(0, 1).flatten(0, 1) for name, tensor in batch.items()}
