"""A stage that is killed at any point and run again ends bit-equal to an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from toy_stage import LENGTH, ToyRun, toy_batches, toy_config, toy_heldout

from linearize.errors import InputError
from linearize.training import checkpoint as checkpoint_module
from linearize.training.checkpoint import FILE, PREVIOUS, check_formats, load_checkpoint
from linearize.training.loop import StageResult, run_stage
from linearize.training.tracking import LOG, make_tracker

IDENTITY = {"data": {"files": ["a.txt"], "length": LENGTH}, "plan": {"layers": "all"}}
# Everything that a checkpoint must carry plays a part: dropout, a plateau, early stopping, the best in the middle.
SETTINGS: dict[str, Any] = {
    "steps": 37, "micro_batch": 3, "lr": 0.3, "seed": 1, "schedule": "plateau", "plateau_patience": 1,
    "plateau_factor": 0.5, "patience": 3,
}  # fmt: skip


class Killed(BaseException):
    """As final as a signal, but the test survives it."""


def train(run: ToyRun, folder: Path | None, *, every: float = 1e9, **changes: Any) -> StageResult:
    config = toy_config(**SETTINGS | changes)
    return run_stage(
        run, config, toy_batches, toy_heldout(), length=LENGTH, checkpoint_dir=folder, identity=IDENTITY,
        checkpoint_seconds=every, tracker=make_tracker(folder),
    )  # fmt: skip


def new_run() -> ToyRun:
    return ToyRun(dropout=0.2)


@pytest.fixture(scope="module")
def unbroken() -> tuple[ToyRun, StageResult]:
    run = new_run()
    return run, train(run, None)


def assert_same(run: ToyRun, result: StageResult, unbroken: tuple[ToyRun, StageResult]) -> None:
    expected_run, expected = unbroken
    weights, expected_weights = run.weights(), expected_run.weights()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert (result.losses, result.heldout) == (expected.losses, expected.heldout)
    assert (result.best_step, result.steps, result.stopped_early) == (
        expected.best_step, expected.steps, expected.stopped_early,
    )  # fmt: skip


def test_the_unbroken_run_has_all_that_a_checkpoint_must_carry(unbroken: tuple[ToyRun, StageResult]) -> None:
    result = unbroken[1]
    assert 0 < result.best_step < result.steps - 4
    assert result.stopped_early
    assert result.losses != train(ToyRun(dropout=0.0), None).losses


@pytest.mark.parametrize("every", [0.0, 1e9])
@pytest.mark.parametrize("forwards", [[1], [2], [3 * 4], [3 * 4 + 1], [3 * 9 + 2, 3 * 13, 3 * 16 + 1], [3 * 22 + 3]])
def test_killed_in_a_forward(
    tmp_path: Path, unbroken: tuple[ToyRun, StageResult], forwards: list[int], every: float
) -> None:
    seen = 0

    def kill(_: int) -> None:
        nonlocal seen
        seen += 1
        if forwards and seen == forwards[0]:
            forwards.pop(0)
            raise Killed

    while forwards:
        run = new_run()
        run.before_loss = kill
        with pytest.raises(Killed):
            train(run, tmp_path, every=every)
    run = new_run()
    assert_same(run, train(run, tmp_path, every=every), unbroken)


def half_written(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    SAVE(tensors, path, metadata=metadata)
    os.truncate(path, path.stat().st_size // 2)
    raise Killed


def not_renamed(*_: Any) -> None:
    raise Killed


def renamed_and_dead(source: Path, target: Path) -> None:
    REPLACE(source, target)
    raise Killed


SAVE, REPLACE = checkpoint_module.save_file, os.replace


@pytest.mark.parametrize("after", [0, 1, 4, 6])
@pytest.mark.parametrize(
    ("where", "name", "death"),
    [(checkpoint_module, "save_file", half_written), (os, "replace", not_renamed), (os, "replace", renamed_and_dead)],
)
def test_killed_while_a_checkpoint_is_written(
    tmp_path: Path, unbroken: tuple[ToyRun, StageResult], monkeypatch: pytest.MonkeyPatch, after: int, where: Any,
    name: str, death: Callable[..., None],
) -> None:  # fmt: skip
    calls, original = 0, getattr(where, name)

    def maybe(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        (death if calls == after + 1 else original)(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, maybe)
        with pytest.raises(Killed):
            train(new_run(), tmp_path)
    run = new_run()
    assert_same(run, train(run, tmp_path), unbroken)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, LOG}, "the previous one goes when the stage ends"
    if after > 0:
        assert run.forwards < 3 * unbroken[1].steps, "the old checkpoint was lost"


CHILD = """
import os, signal, sys
from pathlib import Path
from linearize.training import checkpoint
import test_resume
save, calls = checkpoint.save_file, 0
def die(tensors, path, metadata):
    global calls
    calls += 1
    save(tensors, path, metadata=metadata)
    if calls == 3:
        os.truncate(path, path.stat().st_size // 3)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = die
test_resume.train(test_resume.new_run(), Path(sys.argv[1]))
"""


def test_a_real_sigkill_in_the_middle_of_a_checkpoint(tmp_path: Path, unbroken: tuple[ToyRun, StageResult]) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent / "support"), str(Path(__file__).parents[1] / "src")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / f"{FILE}.partial").exists()
    run = new_run()
    assert_same(run, train(run, tmp_path), unbroken)
    assert run.forwards < 3 * unbroken[1].steps, "nothing was resumed"
    assert not (tmp_path / f"{FILE}.partial").exists()


def test_a_stage_that_ended_is_not_run_again(tmp_path: Path, unbroken: tuple[ToyRun, StageResult]) -> None:
    first = train(new_run(), tmp_path)
    before = (tmp_path / FILE).stat()
    run = new_run()
    again = train(run, tmp_path)
    assert_same(run, again, unbroken)
    assert (again, run.forwards, run.finished) == (first, 0, 1)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert {name.partition("/")[0] for name in file.keys()} == {"parameter"}  # noqa: SIM118 (no dict)
    after = (tmp_path / FILE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "written again"


def test_the_log_of_a_broken_run_is_that_of_an_unbroken_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(new_run(), whole)
    run = new_run()

    def kill(forwards: int) -> None:
        if forwards == 3 * 18 + 2:
            raise Killed

    run.before_loss = kill
    with pytest.raises(Killed):
        train(run, broken)
    with (broken / LOG).open("a") as file:
        file.write('{"stage": "toy", "st')
    train(new_run(), broken)
    lines = (whole / LOG).read_text().splitlines()
    assert len(lines) > 30
    assert (broken / LOG).read_text().splitlines() == lines


def interrupted(folder: Path, forwards: int = 3 * 6) -> None:
    run, at = new_run(), forwards

    def kill(forwards: int) -> None:
        if forwards == at:
            raise Killed

    run.before_loss = kill
    with pytest.raises(Killed):
        train(run, folder)


def test_a_checkpoint_of_another_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(InputError, match=r"another run \(stage.lr was 0.3, is 0.1\): .*delete"):
        train(new_run(), tmp_path, lr=0.1)
    config = toy_config(**SETTINGS)
    other = {"data": {"files": ["b.txt"], "length": LENGTH}, "seed": 4}
    with pytest.raises(
        InputError, match=r"data.files was \['a.txt'\], is \['b.txt'\]; plan.layers was all, is unset; seed"
    ):
        run_stage(ToyRun(), config, toy_batches, [], length=LENGTH, checkpoint_dir=tmp_path, identity=other)


def test_a_checkpoint_with_other_parameters_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    run = new_run()
    run.model.hidden.bias = torch.nn.Parameter(torch.zeros(14))
    before = run.weights()
    with pytest.raises(InputError, match=r"parameter/hidden.bias has shape \(13,\) there, not \(14,\)"):
        train(run, tmp_path)
    run.model.hidden.register_parameter("bias", None)
    with pytest.raises(InputError, match=r"parameter/hidden.bias has shape \(13,\) there, not None"):
        train(run, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in run.weights().items())


def spoil(path: Path, how: str) -> None:
    """Damage a file as disks and people do."""
    content = bytearray(path.read_bytes())
    if how == "bit":  # of a tensor's value: the file itself stays valid
        content[-17] ^= 4
    path.write_bytes({"empty": b"", "other": b"no tensors", "half": content[: len(content) // 2]}.get(how, content))


@pytest.mark.parametrize("how", ["empty", "other", "half", "bit"])
@pytest.mark.parametrize("which", ["newest", "both", "only"])
def test_a_damaged_checkpoint_is_never_trained_on(
    tmp_path: Path, unbroken: tuple[ToyRun, StageResult], caplog: pytest.LogCaptureFixture, how: str, which: str
) -> None:
    interrupted(tmp_path, forwards=3 * 14)
    assert (tmp_path / FILE).is_file() and (tmp_path / PREVIOUS).is_file()
    spoil(tmp_path / FILE, how)
    if which == "both":
        spoil(tmp_path / PREVIOUS, how)
    if which == "only":
        (tmp_path / PREVIOUS).unlink()
    run = new_run()
    assert_same(run, train(run, tmp_path), unbroken)
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path / FILE} is damaged" in message and "\n" not in message
    ends = "continues from the checkpoint before it" if which == "newest" else "the stage starts anew"
    assert message.endswith(ends)
    assert (run.forwards < 3 * unbroken[1].steps) == (which == "newest")


def test_killed_between_the_two_renames(
    tmp_path: Path, unbroken: tuple[ToyRun, StageResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead_before_the_second(source: Path, target: Path) -> None:
        REPLACE(source, target)
        if Path(target).name == PREVIOUS:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dead_before_the_second)
        with pytest.raises(Killed):
            train(new_run(), tmp_path)
    assert not (tmp_path / FILE).exists() and (tmp_path / PREVIOUS).is_file()
    run = new_run()
    assert_same(run, train(run, tmp_path), unbroken)
    assert run.forwards < 3 * unbroken[1].steps


@pytest.mark.parametrize("fields", [{"format": "7", "linearize": "9.9"}, {}])
def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, fields: dict[str, str]) -> None:
    path = tmp_path / "1-toy" / FILE
    path.parent.mkdir()
    SAVE({"parameter/a": torch.ones(3)}, path, metadata={"scalars": "{}", "identity": "{}", **fields})
    message = r"linearize 9\.9 in format 7; this is .* with format 1" if fields else "older version in format 0"
    for look in (lambda: check_formats(tmp_path), lambda: load_checkpoint(path.parent, identity={}, shapes={})):
        with pytest.raises(InputError, match=message) as caught:
            look()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.is_file()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path)
    old = (tmp_path / FILE).read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"some")
        raise checkpoint_module.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(new_run(), tmp_path)
    assert (tmp_path / FILE).read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {FILE, LOG}
