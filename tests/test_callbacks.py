"""Callbacks of a conversion see every step, evaluation and stage; one that stops leaves a run that continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from many import together
from safetensors.torch import load_file
from teacher_folder import write_teacher, write_text
from toy_stage import LENGTH, ToyRun, toy_batches, toy_config, toy_heldout

import linearize
from linearize.conversion import outputs
from linearize.errors import InputError
from linearize.training.callbacks import Evaluation, Step, StopTraining
from linearize.training.loop import StageResult, run_stage

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "plan": {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 3}},
    "data": {"length": 40, "heldout": 0.2},
    "stages": [
        {"name": "attention_transfer", "tokens": 480, "lr": 1e-2, "batch": 3, "evaluate_every": 2},
        {"name": "distill", "tokens": 360, "lr": 1e-3, "batch": 3, "evaluate_every": 2},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("callbacks")
    write_teacher(path / "teacher", num_hidden_layers=3)
    write_text(path / "text.txt")
    (path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_stages", "plot_layer_error"):
        monkeypatch.setattr(f"linearize.conversion.outputs.{name}", lambda *_: [])


def convert(folder: Path, out: Path, *callbacks: object, **options: Any) -> Any:
    return linearize.convert(
        folder / "teacher", data=[folder / "text.txt"], recipe=str(folder / "tiny.yaml"), device="cpu", out=out,
        callbacks=callbacks, **options,
    )  # fmt: skip


class Watch:
    """Keeps what it sees, and stops where it is told to: `(kind, stage number, step)`."""

    def __init__(self, *stops: tuple[str, str, int]) -> None:
        self.stops, self.seen = stops, []

    def _keep(self, kind: str, stage: str, step: int) -> bool:
        self.seen.append((kind, stage, step))
        return (kind, stage, step) in self.stops

    def on_step(self, info: Step) -> bool:
        assert info.numbers["loss"] == info.loss and info.tokens_per_second > 0 and info.numbers["lr"] > 0
        assert info.steps in (2, 3, 4) and info.seconds_left >= 0
        return self._keep("step", info.stage, info.step)

    def on_evaluate(self, info: Evaluation) -> bool:
        assert info.best <= info.loss
        return self._keep("evaluate", info.stage, info.step)

    def on_stage_end(self, result: StageResult) -> bool:
        return self._keep("end", result.name, result.steps)


FIRST, SECOND = "0-attention_transfer", "1-distill"
WHOLE = [
    ("evaluate", FIRST, 0), ("step", FIRST, 1), ("step", FIRST, 2), ("evaluate", FIRST, 2), ("step", FIRST, 3),
    ("step", FIRST, 4), ("evaluate", FIRST, 4), ("end", FIRST, 4),
    ("evaluate", SECOND, 0), ("step", SECOND, 1), ("step", SECOND, 2), ("evaluate", SECOND, 2), ("step", SECOND, 3),
    ("evaluate", SECOND, 3), ("end", SECOND, 3),
]  # fmt: skip


def test_they_see_everything_in_order(folder: Path, tmp_path: Path) -> None:
    watch, steps = Watch(), []

    class OnlySteps:
        def on_step(self, info: Step) -> None:
            steps.append(info.step)

    assert convert(folder, tmp_path / "s", watch, OnlySteps()) is not None
    assert watch.seen == WHOLE and steps == [1, 2, 3, 4, 1, 2, 3]


@pytest.mark.parametrize("stop", [WHOLE[1], WHOLE[3], WHOLE[5], WHOLE[7], WHOLE[10], WHOLE[14]], ids=str)
def test_a_stopped_run_goes_on_where_it_was(folder: Path, tmp_path: Path, stop: tuple[str, str, int]) -> None:
    """To the weights of a run that nobody stopped, without a step done twice."""
    assert convert(folder, tmp_path / "whole") is not None
    first, second = Watch(stop), Watch()
    assert convert(folder, tmp_path / "s", first) is None
    assert not (tmp_path / "s").exists() and (tmp_path / ".s.run").is_dir()
    assert stop in first.seen[-2:]  # an evaluation that is due comes before the run ends
    assert convert(folder, tmp_path / "s", second) is not None and not (tmp_path / ".s.run").exists()
    done = [event for event in first.seen + second.seen if event[0] == "step"]
    assert done == [event for event in WHOLE if event[0] == "step"]
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "s"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_blocks_can_be_stopped_too(folder: Path, tmp_path: Path) -> None:
    class After:
        ended: list[str]

        def __init__(self) -> None:
            self.ended = []

        def on_stage_end(self, result: StageResult) -> bool:
            self.ended.append(result.name)
            return len(self.ended) == 1

    options: dict[str, Any] = {"overrides": {"stages.0.block": 1, "stages.1.tokens": 0}, "stream": True}
    first = After()
    assert convert(folder, tmp_path / "s", first, **options) is None and len(first.ended) == 1
    second = After()
    convert(folder, tmp_path / "s", second, **options)
    third = After()
    third.ended = ["", ""]
    convert(folder, tmp_path / "s", third, **options)
    assert not set(first.ended) & set(second.ended) and (tmp_path / "s" / "model.safetensors").is_file()


def test_a_stage_without_a_folder_stops() -> None:
    class Stop:
        def on_step(self, info: Step) -> bool:
            return info.step == 2

    with pytest.raises(StopTraining, match="step 2"):
        run_stage(ToyRun(), toy_config(steps=9), toy_batches, toy_heldout(), length=LENGTH, callbacks=[Stop()])


def test_an_object_that_would_never_be_called_is_refused(folder: Path, tmp_path: Path) -> None:
    class Misspelt:
        def on_steps(self, info: Step) -> None:
            """Nothing calls it."""

    with pytest.raises(InputError, match="on_step, on_evaluate or on_stage_end"):
        convert(folder, tmp_path / "s", Misspelt())
    assert not list(tmp_path.iterdir())


# several processes


def convert_together(folder: str, out: str, overrides: dict[str, Any], *stops: tuple[str, str, int]) -> Any:
    """What the callbacks saw on this process, and whether there is a student; then of the call again, if it stopped."""
    for name in ("plot_stages", "plot_layer_error"):
        setattr(outputs, name, lambda *_: [])
    results: list[Any] = []
    for stop in (stops, ()):
        watch = Watch(*stop)
        student = convert(Path(folder), Path(out), watch, overrides=overrides)
        results.append((watch.seen, student is not None))
        if student is not None:
            break
    return results


BLOCKS = {"stages.0.block": 1, "stages.1.batch": 4}
NAMES = [f"{FIRST}/layers-00{n}-00{n}" for n in range(3)]


@pytest.mark.slow
def test_the_first_of_several_processes_sees_the_blocks_of_all(folder: Path, tmp_path: Path) -> None:
    first, other = together(2, convert_together, str(folder), str(tmp_path / "s"), BLOCKS)
    [(seen, whole)] = first
    assert whole and other == [([], True)]
    for name in NAMES:
        events = [event[::2] for event in seen if event[1] == name]
        assert events == [event[::2] for event in WHOLE if event[1] == FIRST]
    assert [event for event in seen if event[1] == SECOND][-1][0] == "end" and seen[-1][1] == SECOND


@pytest.mark.slow
@pytest.mark.parametrize("block", range(3))
def test_a_stop_on_any_block_stops_all_processes(folder: Path, tmp_path: Path, block: int) -> None:
    """Whichever process trains the block; the same call continues, and no step is done or seen twice."""
    stop = ("step", NAMES[block], 2)
    results = together(2, convert_together, str(folder), str(tmp_path / "s"), BLOCKS, stop)
    ((first, stopped), (second, whole)), other = results
    assert stop in first and not stopped and whole and other == [([], False), ([], True)]
    assert (tmp_path / "s" / "model.safetensors").is_file() and not (tmp_path / ".s.run").exists()
    for name in NAMES:
        steps = [event[2] for event in first + second if event[:2] == ("step", name)]
        assert steps == [1, 2, 3, 4]
