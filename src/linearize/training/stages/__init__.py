"""The stages of training, one file each; a new stage is one file and one row of `STAGES`, or a package registers it."""

from __future__ import annotations

from typing import TypeVar

from linearize.registry import Table, config_name, named_config
from linearize.training.config import StageConfig
from linearize.training.stages.attention_transfer import AttentionTransferConfig
from linearize.training.stages.distill import DistillConfig
from linearize.training.stages.dpo import DpoConfig
from linearize.training.stages.hidden_alignment import HiddenAlignmentConfig
from linearize.training.stages.lowrank import LowRankConfig
from linearize.training.stages.matrix_alignment import MatrixAlignmentConfig
from linearize.training.stages.sft import SftConfig

__all__ = ["STAGES", "register_stage"]

Config = TypeVar("Config", bound=StageConfig)
_OWN: dict[str, type[StageConfig]] = {
    "attention_transfer": AttentionTransferConfig,
    "distill": DistillConfig,
    "dpo": DpoConfig,
    "hidden_alignment": HiddenAlignmentConfig,
    "lowrank": LowRankConfig,
    "matrix_alignment": MatrixAlignmentConfig,
    "sft": SftConfig,
}
STAGES: Table[type[StageConfig]] = Table("stage", "linearize.stages", _OWN, named_config(StageConfig))


def register_stage(config: type[Config]) -> type[Config]:
    """Let recipes name a stage of another package; returns the class, so it decorates.

    `config` derives from `StageConfig`, its field `name` has the stage's name as default, and `build(student, teacher)`
    returns the `StageRun` that the common loop trains. The entry-point group is `linearize.stages`.

    Raises:
        InputError: a name that is taken, or a class that is no stage's config.
    """
    STAGES.register(config_name(config), config)
    return config
