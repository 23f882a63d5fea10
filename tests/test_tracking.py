"""Progress and logs of a stage."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from toy_stage import LENGTH, ToyRun, toy_batches, toy_config, toy_heldout

from linearize.errors import InputError
from linearize.training.loop import run_stage
from linearize.training.progress import BarProgress, LineProgress, Progress, make_progress
from linearize.training.tracking import LOG, Tracker, make_tracker


def train(*, progress: Progress | None = None, tracker: Tracker | None = None, name: str = "0-toy") -> None:
    run_stage(
        ToyRun(), toy_config(steps=9), toy_batches, toy_heldout(), length=LENGTH, progress=progress, tracker=tracker,
        name=name,
    )  # fmt: skip


def test_lines_go_to_stderr_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress()
    assert isinstance(progress, LineProgress)
    train(progress=progress)
    seen = capsys.readouterr()
    lines = seen.err.splitlines()
    assert seen.out == ""
    assert lines[0] == "0-toy: 9 steps"
    assert [line.split(",")[0] for line in lines if "held-out" in line] == [f"0-toy: step {k}/9" for k in (0, 4, 8, 9)]
    assert sum("tokens/s" in line for line in lines) == 1, "within ten seconds only the last step is shown"
    assert all(
        word in next(line for line in lines if "tokens/s" in line)
        for word in ("step 9/9", "loss 2.", "tokens/s", "0:00:00 left")
    )


def test_a_line_per_step_if_they_are_slow() -> None:
    stream = io.StringIO()
    train(progress=LineProgress(stream=stream, every=0.0))
    assert stream.getvalue().count("tokens/s") == 9


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(make_progress(), BarProgress)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    train(progress=BarProgress(console=console))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in shown for word in ("0-toy", "9/9", "tokens/s", "left", "held-out"))


def test_the_log_has_every_step_and_every_evaluation_of_every_stage(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path / "run")
    train(tracker=tracker, name="0-toy")
    train(tracker=tracker, name="1-toy")
    train(tracker=tracker, name="1-toy")  # begins anew: the first attempt's lines go
    records = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    for stage in ("0-toy", "1-toy"):
        mine = [record for record in records if record["stage"] == stage]
        assert [record["step"] for record in mine if "loss" in record] == list(range(1, 10))
        assert [record["step"] for record in mine if "heldout_loss" in record] == [0, 4, 8, 9]
    assert {"loss", "lr", "gradient_norm", "counted"} <= records[1].keys()


def test_no_folder_no_log() -> None:
    train(tracker=make_tracker(None))


def test_tensorboard_when_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tracker=make_tracker(tmp_path, ["tensorboard"]))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "0-toy"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))
    assert [event.step for event in events.Scalars("heldout_loss")] == [0, 4, 8, 9]
    assert (tmp_path / LOG).exists()


def test_wandb_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    class Run:
        def define_metric(self, name: str, *, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "optimiser_step")

        def log(self, values: dict[str, float]) -> None:
            logged.append(values)

        def finish(self) -> None:
            logged.append({})

    def init(**options: Any) -> Run:
        started.append(options)
        return Run()

    fake = ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = make_tracker(tmp_path, ["wandb"])
    train(tracker=tracker, name="0-toy")
    train(tracker=tracker, name="1-toy")
    train(tracker=tracker, name="1-toy")
    assert [options["name"] for options in started] == [f"{tmp_path.name}/{k}-toy" for k in (0, 1, 1)]
    assert started[0]["id"] != started[1]["id"] == started[2]["id"]
    assert [values["optimiser_step"] for values in logged if "loss" in values] == 3 * list(range(1, 10))
    assert logged.count({}) == 3


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=rf"{package} is not installed: .*linearize\[track\]"):
            make_tracker(tmp_path, [package])


def test_an_unknown_tracker_and_one_without_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'tensorboard'"):
        make_tracker(tmp_path, ["tensorbord"])
    with pytest.raises(InputError, match="folder"):
        make_tracker(None, ["wandb"])
