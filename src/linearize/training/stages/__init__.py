"""The stages of training, one file each; a new stage is one file and one row of `STAGES`."""

from __future__ import annotations

from linearize.training.config import StageConfig
from linearize.training.stages.attention_transfer import AttentionTransferConfig
from linearize.training.stages.lowrank import LowRankConfig

__all__ = ["STAGES"]

STAGES: dict[str, type[StageConfig]] = {
    "attention_transfer": AttentionTransferConfig,
    "lowrank": LowRankConfig,
}
