"""Direct preference optimization (Rafailov et al., 2305.18290) and two relatives, always against an explicit reference:
a frozen copy of the student as the stage finds it.

Letters: B pairs, T tokens; a leading 2 is chosen and rejected.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.io.adapters import kept_adapters
from linearize.modeling.parallel import gather_while_running, is_unit, plain_copy
from linearize.training.config import Batch, LossSum, ParameterGroup, StageRun
from linearize.training.data.chat import with_template
from linearize.training.data.packing import IGNORED
from linearize.training.data.preferences import PreferencePair, read_preferences, tokenize_preferences
from linearize.training.dataset_stage import DatasetStageConfig, padded, until_last_label
from linearize.training.stages.chunked_logits import SplitModel
from linearize.training.stages.losses import answer_log_probs
from linearize.training.student_run import LogitsRun

PreferenceLoss = Literal["sigmoid", "ipo", "hinge"]


class DpoConfig(DatasetStageConfig):
    """Settings of the stage. A row of `batch` is a pair; `length` holds for each of its two texts.

    `beta`: how dearly distance from the reference is paid; The Mamba in the Llama (2408.15237) takes 0.01. `loss`: the
    published one (`sigmoid`), `ipo` (2310.12036) or `hinge`.
    """

    name: Literal["dpo"] = "dpo"
    lr: float = Field(5e-7, gt=0)
    beta: float = Field(0.1, gt=0)
    loss: PreferenceLoss = "sigmoid"

    def rows(self, tokenizer: PreTrainedTokenizerBase, context: int | None) -> list[PreferencePair]:
        """The preferences as tokens. Raises InputError for data that cannot be used."""
        tokenizer, length = with_template(tokenizer, self.chat_template), self.row_length(context)
        return tokenize_preferences(read_preferences(self.data, tokenizer), tokenizer, length)

    def collate(self, rows: Sequence[PreferencePair], pad: int) -> Batch:
        """The chosen and the rejected text of each pair, `[B, 2, T]`."""
        documents = list(chain.from_iterable((pair.chosen, pair.rejected) for pair in rows))
        return {name: tensor.unflatten(0, (-1, 2)) for name, tensor in padded(documents, pad).items()}

    def build(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> StageRun:
        """The stage over a student; of the teacher only the tensors that both share matter."""
        return Dpo(self, student, self.trained_parameters(student, teacher))


class Dpo(LogitsRun):
    """The running stage."""

    def __init__(self, config: DpoConfig, student: LinearizedForCausalLM, trained: ParameterGroup) -> None:
        super().__init__(student, trained)
        self.config, self.split = config, SplitModel(student)
        self.reference = SplitModel(frozen_copy(student, trained.parameters))

    def loss(self, batch: Batch) -> LossSum:
        """The loss of each pair, summed over the pairs, with the means that trl logs, under its names."""
        batch = {name: x.transpose(0, 1).flatten(0, 1) for name, x in until_last_label(batch).items()}
        with torch.no_grad():
            reference_2B = answer_log_probs(self.reference, batch).unflatten(0, (2, -1))
        log_probs_2B = answer_log_probs(self.split, batch).unflatten(0, (2, -1))
        tokens_2B = (batch["labels"] != IGNORED).sum(-1).unflatten(0, (2, -1))
        config, ratio_2B = self.config, log_probs_2B - reference_2B
        loss_B = preference_loss(ratio_2B, tokens_2B, beta=config.beta, kind=config.loss)
        (chosen_B, rejected_B), logps_2B = config.beta * ratio_2B.detach(), log_probs_2B.detach()
        means = {
            "rewards/margins": chosen_B - rejected_B, "rewards/accuracies": (chosen_B > rejected_B).float(),
            "rewards/chosen": chosen_B, "rewards/rejected": rejected_B,
            "logps/chosen": logps_2B[0], "logps/rejected": logps_2B[1],
        }  # fmt: skip
        return LossSum(loss_B.sum(), len(loss_B), {name: float(value.sum()) for name, value in means.items()})

    def finish(self) -> None:
        """Release the reference too."""
        super().finish()
        del self.reference


def preference_loss(ratio_2B: Tensor, tokens_2B: Tensor, *, beta: float, kind: PreferenceLoss) -> Tensor:
    """The loss of each pair, `[B]`, from log p - log p_ref of its answers and the number of their tokens.

    `sigmoid`: -log sigmoid of beta times the difference (2305.18290, equation 7). `hinge`: how far that lacks 1 (SLiC,
    2305.10425, with ratios for likelihoods). `ipo`: the squared distance of the difference from 1 / (2 beta)
    (2310.12036, equation 17), of means over tokens, so that a long answer weighs no more than a short one.
    """
    if kind == "ipo":
        chosen_B, rejected_B = ratio_2B / tokens_2B
        return (chosen_B - rejected_B - 1 / (2 * beta)).square()
    margin_B = beta * (ratio_2B[0] - ratio_2B[1])
    return F.relu(1 - margin_B) if kind == "hinge" else -F.logsigmoid(margin_B)


def frozen_copy(student: nn.Module, trained: Mapping[str, nn.Parameter]) -> Any:
    """A copy of the student in eval mode: own tensors for what trains, the others shared.

    Sharded weights stay so: a module that had some gathers them while it runs.
    """
    moving = {id(value): value for value in trained.values()}
    memo: dict[int, Any] = {id(t): t for t in (*student.parameters(), *student.buffers()) if id(t) not in moving}
    memo |= {key: nn.Parameter(value.detach().clone(), requires_grad=False) for key, value in moving.items()}
    if (kept := kept_adapters(student)) is not None:
        memo[id(kept)] = kept
    units = [plain_copy(module, memo) for module in student.modules() if is_unit(module)]
    copied = copy.deepcopy(student, memo)
    for unit in units:
        gather_while_running(unit)
    return copied.eval()
