"""Blocks read from the disk and then stages on the whole model: in one process, and in those that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from many import command, together
from safetensors.torch import load_file
from teacher_folder import write_teacher, write_text
from torch import Tensor

import linearize
from linearize.conversion.sizes import PROCESS_BYTES
from linearize.errors import InputError
from linearize.recipes.schema import Recipe
from linearize.training.blockwise.run import BlockwiseStage

STAGE = {"tokens": 640, "batch": 4, "evaluate_every": 0.5, "precision": "fp32"}
RECIPE: dict[str, Any] = {
    "name": "road",
    "description": "Block by block, then all together.",
    "source": "A test.",
    "plan": {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 3}, "layers": [0, 2, 3, 4]},
    "data": {"length": 40, "heldout": 0.2},
    "stages": [
        {"name": "attention_transfer", "block": 2, **STAGE, "lr": 1e-2},
        {"name": "lowrank", **STAGE, "lr": 1e-3},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, text, the recipe, and the student of one process with everything in memory."""
    path = tmp_path_factory.mktemp("road")
    write_teacher(path / "teacher", num_hidden_layers=5, shard="40KB")
    write_text(path / "text.txt")
    (path / "road.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        no_plots(patch)
        linearize.convert(path / "teacher", **arguments(path, path / "memory"))
    return path


def no_plots(patch: pytest.MonkeyPatch) -> None:
    for name in ("plot_stages", "plot_layer_error"):
        patch.setattr(f"linearize.conversion.outputs.{name}", lambda *_: [])


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    no_plots(monkeypatch)


def arguments(folder: Path, out: Path, **settings: Any) -> dict[str, Any]:
    recipe = Recipe.from_data(RECIPE).override(settings)
    return {"data": [folder / "text.txt"], "recipe": recipe, "device": "cpu", "out": out}


def argv(folder: Path, out: Path, *more: str) -> list[str]:
    arguments = [str(folder / "teacher"), "--data", str(folder / "text.txt"), "--recipe", str(folder / "road.yaml")]
    return ["convert", *arguments, "--out", str(out), "--device", "cpu", *more]


def weights(out: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(out.glob("*.safetensors")) for name, value in load_file(path).items()}


def distance(one: Path, other: Path) -> float:
    """The largest difference of any weight."""
    expected, actual = weights(one), weights(other)
    assert expected.keys() == actual.keys()
    return max(float((actual[name] - value).abs().max()) for name, value in expected.items())


def losses(out: Path, number: int) -> list[float]:
    """Of a stage, those of the steps and those on held-out text."""
    details = json.loads((out / "report.json").read_text())["stages"][number]["details"]
    return [loss for kind in ("losses", "heldout") for _, loss in details[kind]]


def check_like_memory(folder: Path, out: Path, *, joint: float) -> None:
    """Blocks to the bit, the rest within a bound."""
    memory = folder / "memory"
    assert len(set(losses(memory, 0))) > 3 and losses(out, 0) == losses(memory, 0)
    assert losses(out, 1) == pytest.approx(losses(memory, 1), abs=1e-5)
    assert losses(out, 1)[0] != losses(out, 1)[-1]
    assert distance(memory, out) <= joint
    one, other = (json.loads((path / "report.json").read_text()) for path in (memory, out))
    assert len(other["layer_error"]["1-lowrank"]) == 4
    for key in ("teacher_loss", "swap_loss", "student_loss", "student_kl"):
        assert other[key] == pytest.approx(one[key], abs=1e-5), key
    assert not (out.parent / f".{out.name}.run").exists()


def test_streamed_blocks_and_a_stage_on_the_whole_model(folder: Path, tmp_path: Path) -> None:
    linearize.convert(folder / "teacher", stream=True, **arguments(folder, tmp_path / "out"))
    check_like_memory(folder, tmp_path / "out", joint=0.0)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["provenance"]["streamed"] == {"block": 2}


@pytest.mark.slow
def test_torchrun_shares_out_blocks_and_then_the_model(folder: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LINEARIZE_CACHE": str(tmp_path / "cache")}
    printed = subprocess.run(
        [*launcher, "-m", "linearize", *argv(folder, tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=150,
    )
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.count("student written to") == 1
    check_like_memory(folder, tmp_path / "out", joint=1e-5)
    log = [json.loads(line)["stage"] for p in (tmp_path / "out" / "log").rglob("*.jsonl") for line in p.open()]
    trained = {f"0-attention_transfer/layers-{first:03d}-{last:03d}" for first, last in ((0, 1), (2, 3), (4, 4))}
    assert set(log) == {*trained, "1-lowrank"}, "whoever trained a block, its numbers are in the log"


def dies_in(part: str, arguments: list[str], output: Path) -> int:
    """The command on ranks of which the first to come there is killed in a block, or rank 1 in the stage after them."""
    from linearize.training.loop import _Loop

    run = _Loop.run

    def only(self: Any, *args: Any, **rest: Any) -> Any:
        if part in self.name:
            return broken_step(run, self, *args, **rest)
        return run(self, *args, **rest)

    def broken_step(run: Any, *args: Any, **rest: Any) -> Any:
        import signal

        from linearize.training.step import Stepper

        step = Stepper.step

        def die(self: Any, *args: Any, number: int, **more: Any) -> Any:
            if number == 2 and (self.ranks == 1 or self.rank == 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args, number=number, **more)

        Stepper.step = die  # type: ignore[method-assign]
        return run(*args, **rest)

    _Loop.run = only  # type: ignore[method-assign]
    return command(arguments, output)


@pytest.mark.slow
def test_killed_in_a_block_and_after_them_the_same_command_continues(folder: Path, tmp_path: Path) -> None:
    words = argv(folder, tmp_path / "out", "--stream")
    work = tmp_path / ".out.run"
    assert None in together(2, dies_in, "layers-002", words, tmp_path / "one")
    assert not (work / "0-attention_transfer" / "results" / "layers-002-003.safetensors").exists()
    assert None in together(2, dies_in, "1-lowrank", words, tmp_path / "two")
    assert len(list((work / "0-attention_transfer" / "results").iterdir())) == 3 and not (tmp_path / "out").exists()
    assert together(2, command, words, tmp_path / "three") == [0, 0]
    check_like_memory(folder, tmp_path / "out", joint=1e-5)


@pytest.mark.slow
def test_blocks_trained_elsewhere_are_taken(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = arguments(folder, tmp_path / "out")
    for blocks in ("1-2", "0"):
        linearize.convert(folder / "teacher", stream=True, blocks=blocks, **options)
    monkeypatch.setattr(BlockwiseStage, "_train", lambda *_: pytest.fail("a block is trained again"))
    linearize.convert(folder / "teacher", stream=True, **options)
    check_like_memory(folder, tmp_path / "out", joint=0.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stages.0.block": None}, "set stages.0.block=auto"),
        ({"stages.0.tokens": 0}, r"stages.1 \(lowrank\) needs the whole model"),
        ({"stages.0.tokens": 0, "stages.1.tokens": 0}, "runs none"),
        ({"plan.schedule": {"kind": "progressive", "replaced": [0.5, 1.0]}, "stages.0.at": "last"}, "plan.schedule"),
        ({"stages.1": {"name": "hidden_alignment", "block": 2, **STAGE, "lr": 1e-3}}, "set stages.1.block=null"),
    ],
)
def test_what_cannot_be_streamed_is_refused(folder: Path, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        linearize.convert(folder / "teacher", stream=True, **arguments(folder, tmp_path / "out", **settings))
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_refused_before_blocks_are_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linearize.conversion.streamed.chosen_block", lambda *_, **__: 2)
    options = arguments(folder, tmp_path / "out")
    size = sum(value.nbytes for name, value in weights(folder / "memory").items())
    with pytest.raises(InputError, match=r"lowrank needs the whole model.*torchrun"):
        linearize.convert(folder / "teacher", stream=True, memory=PROCESS_BYTES + size - 5, **options)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(BlockwiseStage, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a little more, and blocks are trained
        linearize.convert(folder / "teacher", stream=True, memory=PROCESS_BYTES + size, **options)
