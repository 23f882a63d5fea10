"""A stage trained block by block on stored hidden states of the teacher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blockwise_cases import LAYERS, LENGTH, heldout, job, joint, mixers_of, rows, stage, student, teacher

import linearize
from linearize.errors import InputError
from linearize.training.blockwise.block_result import merge_results
from linearize.training.blockwise.budget import boundary_bytes
from linearize.training.blockwise.hidden_store import DamagedShardError, HiddenStore
from linearize.training.blockwise.leases import Leases
from linearize.training.blockwise.run import BlockwiseStage
from linearize.training.progress import LineProgress
from linearize.training.stages.hidden_alignment import HiddenAlignmentConfig


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


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_blocks_start_from_the_teachers_own_hidden_states(tmp_path: Path, family: str) -> None:
    its_teacher = teacher(family)
    work, parts, result = blockwise(stage(block=2), 2, tmp_path, student(its_teacher), its_teacher)
    assert [list(part.layers) for part in parts] == [[0, 1], [2, 3], [4]]
    inputs: dict[int, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs, i=i: inputs.update({i: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
        for i, layer in enumerate(its_teacher.model.layers)
    ]
    batch = work.job.rows.inputs("train", range(3))
    with torch.no_grad():
        its_teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    for boundary, first in enumerate((0, 2, 4)):
        torch.testing.assert_close(work.store.read(boundary, "train", range(3)), inputs[first], rtol=1e-5, atol=1e-5)
    assert result.trainable_parameters == sum(p.numel() for p in student(its_teacher).mixer_parameters().values())
    assert result.heldout[-1][1] < result.heldout[0][1]


def test_bytes_are_those_of_the_formula_and_of_rows_that_are_used(tmp_path: Path) -> None:
    its_teacher = teacher()
    work, _, _ = blockwise(stage(block=2, tokens=2 * 3 * LENGTH), 2, tmp_path, student(its_teacher), its_teacher)
    heldout_tokens = sum(batch["input_ids"].numel() for batch in heldout())
    assert len(rows()) > 6  # two steps of three rows leave some unread
    tokens = 6 * LENGTH + heldout_tokens
    assert work.store.payload_bytes == boundary_bytes(tokens, 30, LAYERS, 2, 4) == work.store.written_bytes()


@pytest.mark.slow
def test_a_damaged_shard_is_written_anew_and_never_trained_on(tmp_path: Path) -> None:
    its_teacher = teacher()
    whole, _, expected = blockwise(stage(block=2), 2, tmp_path / "whole", student(its_teacher), its_teacher)
    broken = BlockwiseStage(job(student(its_teacher), its_teacher, stage(block=2), 2, tmp_path / "broken"))
    for boundary in range(3):
        broken.writer.write(boundary)
    flipped, cut, lost = (tmp_path / "broken" / "hidden" / f"{b:03d}" / "train-00000.bin" for b in (0, 1, 2))
    data = bytearray(flipped.read_bytes())
    data[1000] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    lost.unlink()
    with pytest.raises(DamagedShardError, match=r"train-00000.* is damaged"):
        broken.store.read(0, "train", range(4))
    parts = broken.run()
    result = merge_results(parts, "transfer")
    assert result.losses == expected.losses and result.heldout == expected.heldout
    for boundary in range(3):
        for path in (tmp_path / "whole" / "hidden" / f"{boundary:03d}").glob("*.bin"):
            again = tmp_path / "broken" / "hidden" / f"{boundary:03d}" / path.name
            assert again.read_bytes() == path.read_bytes()
    assert whole.store.missing(1) == []


@pytest.mark.slow
def test_an_interrupted_block_continues_and_a_damaged_part_is_trained_again(tmp_path: Path) -> None:
    its_teacher = teacher()
    _, expected, _ = blockwise(stage(block=2), 2, tmp_path / "whole", student(its_teacher), its_teacher)

    class KillError(Exception):
        pass

    class Killer(LineProgress):
        def heldout(self, step: int, loss: float, best: float) -> None:
            if step == 6:
                raise KillError

    broken = job(student(its_teacher), its_teacher, stage(block=2), 2, tmp_path / "broken", progress=Killer())
    for _ in range(3):
        with pytest.raises(KillError):
            BlockwiseStage(broken).run()
    work = BlockwiseStage(job(student(its_teacher), its_teacher, stage(block=2), 2, tmp_path / "broken"))
    work.run()
    path = next((tmp_path / "broken" / "results").glob("layers-002*"))
    path.write_bytes(path.read_bytes()[:-7])
    assert work.result(1) is None and not path.exists()
    parts = BlockwiseStage(job(student(its_teacher), its_teacher, stage(block=2), 2, tmp_path / "broken")).run()
    for part, other in zip(parts, expected, strict=True):
        assert part.stage.losses == other.stage.losses
        assert all(torch.equal(part.final[name], value) for name, value in other.final.items())


def test_another_run_does_not_continue_in_the_same_folder(tmp_path: Path) -> None:
    its_teacher = teacher()
    blockwise(stage(block=2), 2, tmp_path, student(its_teacher), its_teacher)
    with pytest.raises(InputError, match=r"another run or version .*stage.lr was 0.01, is 0.02"):
        blockwise(stage(block=2, lr=2e-2), 2, tmp_path, student(its_teacher), its_teacher)
    with pytest.raises(InputError, match="hidden states of another run"):
        blockwise(stage(block=3), 3, tmp_path, student(its_teacher), its_teacher)


def test_hidden_alignment_by_blocks_is_hidden_alignment(tmp_path: Path) -> None:
    its_teacher = teacher()
    config = HiddenAlignmentConfig(**stage().model_dump(exclude={"name", "mse", "weights_ce", "normalize"}))
    one, other = (student(its_teacher) for _ in range(2))
    expected = joint(one, its_teacher, config)
    _, parts, result = blockwise(config, LAYERS, tmp_path, other, its_teacher)
    assert result.losses == expected.losses and result.heldout == expected.heldout
    assert all(torch.equal(parts[0].final[name], value) for name, value in mixers_of(one).items())


def test_leases_belong_to_one_and_are_free_when_their_holder_is_gone(tmp_path: Path) -> None:
    leases, others = Leases(tmp_path), Leases(tmp_path, stale_seconds=0.2)
    with leases.take("block-0") as mine:
        assert mine is not None
        with leases.take("block-0") as second, leases.take("block-1") as free:
            assert second is None and free is not None
        assert "process" in (leases.holder("block-0") or "")
        os.utime(mine.path, (1, 1))  # not heard of for long
        with others.take("block-0") as taken:
            assert taken is not None
            mine.renew()
            with pytest.raises(RuntimeError, match="taken over"):
                mine.check()
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = {"host": socket.gethostname(), "pid": int(done.stdout), "born": "1", "token": "x"}
    (tmp_path / "block-2.lease").write_text(json.dumps(dead))
    with leases.take("block-2") as inherited:
        assert inherited is not None
    assert not list(tmp_path.glob("*.lease"))


def test_bf16_hidden_states_take_two_bytes(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path, {"train": (5, 3)}, boundaries=1, model_dim=7, dtype=torch.bfloat16, identity={})
    values = torch.randn(5, 3, 7).bfloat16()
    store.write((shard, [values[shard.first : shard.end]]) for shard in store.shards(0))
    assert store.written_bytes() == 5 * 3 * 7 * 2
    assert torch.equal(store.read(0, "train", [4, 0]), values[[4, 0]])


@pytest.mark.slow
def test_a_block_of_one_layer_is_as_good_as_the_joint_stage(shared_dir: Path, tmp_path: Path) -> None:
    folder, text = shared_dir / "teachers" / "stories260k", shared_dir / "data" / "tinystories" / "train_b.txt"
    stories = tmp_path / "stories.txt"
    stories.write_text(text.read_text("utf-8")[:60_000])
    loss = {}
    for block in (None, 1):
        settings = {
            "data.length": 128, "data.max_heldout_tokens": 4000, "stages.0.tokens": 40 * 8 * 128, "stages.0.batch": 8,
            "stages.1.tokens": 0, "stages.0.block": block, "plan.mixer.window": 16, "plan.mixer.feature_dim": 8,
        }  # fmt: skip
        out = tmp_path / f"student-{block}"
        linearize.convert(folder, data=[stories], out=out, overrides=settings, device="cpu")
        report = json.loads((out / "report.json").read_text())
        loss[block] = report["stages"][0]["loss_after"]
        assert loss[block] < report["swap_loss"] - 0.01
    assert loss[1] <= loss[None] + 0.01
    print(loss)
