"""A stage trained block by block on stored hidden states of the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blockwise_cases import LAYERS, job, joint, mixers_of, stage, student, teacher

from linearize.training.blockwise.parts import merge_results
from linearize.training.blockwise.run import BlockwiseStage


def blockwise(config, block: int, folder: Path, model, its_teacher):
    work = BlockwiseStage(job(model, its_teacher, config, block, folder))
    parts = work.run()
    return work, parts, merge_results(parts, "transfer")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_one_block_of_all_layers_is_the_joint_stage_to_the_bit(tmp_path: Path, family: str) -> None:
    its_teacher = teacher(family)
    one, other = student(its_teacher), student(its_teacher)
    before = mixers_of(one)
    expected = joint(one, its_teacher, stage())
    _, parts, result = blockwise(stage(block=LAYERS), LAYERS, tmp_path, other, its_teacher)
    assert result.losses == expected.losses and result.heldout == expected.heldout
    assert result.best_step == expected.best_step > 0
    trained = mixers_of(one)
    assert trained.keys() == parts[0].final.keys()
    for name, value in trained.items():
        assert torch.equal(parts[0].final[name], value), name
        assert torch.equal(parts[0].start[name], before[name]), name
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
