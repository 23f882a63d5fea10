"""Logs of a run: always JSONL in the run's folder, TensorBoard and wandb on request."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from linearize.errors import InputError, unknown
from linearize.storage.atomic import atomic_write_text

LOG = "training.jsonl"


class Tracker(Protocol):
    """Log the numbers of one stage after the other."""

    def begin(self, stage: str, step: int | None) -> None:
        """A stage starts (None), or resumes after `step` steps: what was logged beyond that step is withdrawn."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, true after `step` optimiser steps."""
        ...

    def end(self) -> None:
        """The stage is over, finished or not."""
        ...


class JsonlTracker:
    """One JSON object per line, `{"stage": ..., "step": ..., **values}`, in `<folder>/training.jsonl`."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written before the first stage begins."""
        self._path = folder / LOG
        self._stage = ""
        self._file: TextIO | None = None

    def begin(self, stage: str, step: int | None) -> None:
        """Drop the lines of this stage that the run will write again, and an incomplete last line."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stage = stage
        if self._path.exists():
            self._withdraw(-1 if step is None else step)
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line."""
        if self._file is not None:
            self._file.write(json.dumps({"stage": self._stage, "step": step, **values}) + "\n")
            self._file.flush()

    def end(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _withdraw(self, step: int) -> None:
        kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if self._stays(line, step)]
        atomic_write_text(self._path, "".join(f"{line}\n" for line in kept))

    def _stays(self, line: str, step: int) -> bool:
        try:
            record = json.loads(line)
        except ValueError:
            return False
        return bool(record["stage"] != self._stage or record["step"] <= step)


class TensorBoardTracker:
    """Scalars in `<folder>/tensorboard/<stage>`."""

    def __init__(self, folder: Path) -> None:
        """Raises `InputError` if tensorboard is not installed."""
        self._folder = folder / "tensorboard"
        _import("tensorboard", "tensorboard")
        self._writer_class = _import("tensorboard", "torch.utils.tensorboard").SummaryWriter
        self._writer: Any = None

    def begin(self, stage: str, step: int | None) -> None:
        """Opens the stage's own log."""
        purge = 0 if step is None else step + 1
        self._writer = self._writer_class(str(self._folder / stage), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar per value."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def end(self) -> None:
        """Writes what is buffered."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbTracker:
    """One wandb run per stage, in the project `linearize`; a resumed stage continues in the same run."""

    def __init__(self, folder: Path) -> None:
        """Raises `InputError` if wandb is not installed."""
        self._folder = folder
        self._wandb = _import("wandb", "wandb")
        self._run: Any = None

    def begin(self, stage: str, step: int | None) -> None:
        """Start a run, or resume the stage's run. A step logged twice appears twice, since wandb cannot remove it."""
        name = f"{self._folder.resolve().name}/{stage}"
        key = hashlib.blake2b(f"{self._folder.resolve()}/{stage}".encode(), digest_size=8).hexdigest()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = self._wandb.init(
            project="linearize", name=name, id=key, resume="allow", dir=str(self._folder), reinit="finish_previous"
        )
        self._run.define_metric("*", step_metric="optimiser_step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs all values at once."""
        self._run.log({"optimiser_step": step, **values})

    def end(self) -> None:
        """Finishes the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        """Passes every call on to all of them, in order."""
        self._trackers = trackers

    def begin(self, stage: str, step: int | None) -> None:
        """A stage starts or resumes."""
        for tracker in self._trackers:
            tracker.begin(stage, step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step` steps."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def end(self) -> None:
        """The stage is over."""
        for tracker in self._trackers:
            tracker.end()


TRACKERS: dict[str, type[TensorBoardTracker] | type[WandbTracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def make_tracker(folder: Path | None, track: Sequence[str] = ()) -> Tracker:
    """The JSONL log if there is a run folder, and the requested trackers.

    Raises:
        InputError: an unknown tracker, one whose package is missing, or one without a folder to write to.
    """
    for name in track:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
    if folder is None:
        if track:
            raise InputError(f"tracking with {', '.join(track)} needs a folder to write to: give one")
        return Trackers([])
    return Trackers([JsonlTracker(folder), *(TRACKERS[name](folder) for name in dict.fromkeys(track))])


def _import(package: str, module: str) -> Any:
    """Import a module of an optional package. Raises `InputError` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{package} is not installed: run `pip install linearize[track]`") from error
