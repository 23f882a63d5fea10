"""The stages of training, one file each; a new stage is one file and one row of `STAGES`."""

from __future__ import annotations

from linearize.training.config import StageConfig
from linearize.training.stages.attention_transfer import AttentionTransferConfig
from linearize.training.stages.distill import DistillConfig
from linearize.training.stages.dpo import DpoConfig
from linearize.training.stages.hidden_alignment import HiddenAlignmentConfig
from linearize.training.stages.lowrank import LowRankConfig
from linearize.training.stages.matrix_alignment import MatrixAlignmentConfig
from linearize.training.stages.sft import SftConfig

__all__ = ["STAGES"]

STAGES: dict[str, type[StageConfig]] = {
    "attention_transfer": AttentionTransferConfig,
    "distill": DistillConfig,
    "dpo": DpoConfig,
    "hidden_alignment": HiddenAlignmentConfig,
    "lowrank": LowRankConfig,
    "matrix_alignment": MatrixAlignmentConfig,
    "sft": SftConfig,
}
