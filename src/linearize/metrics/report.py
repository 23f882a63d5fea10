"""`report.json`: what a conversion brought, on held-out tokens that training never saw, and under which conditions."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linearize.errors import InputError
from linearize.metrics.language_model import BranchAblation, LanguageModelingReport
from linearize.ops.matmul import cpu_name
from linearize.storage.atomic import atomic_write_text
from linearize.storage.files import read_json
from linearize.training.config import StageConfig
from linearize.training.dataset_stage import DatasetStageConfig
from linearize.training.loop import StageResult

FILE_NAME = "report.json"
LIBRARIES = ("torch", "transformers", "peft", "datasets", "safetensors", "tokenizers", "numpy")


class StageReport(BaseModel):
    """One stage: held-out next-token losses before and after it (nats per token), what it trained and for how long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    loss_before: float
    loss_after: float
    tokens: int = Field(description="training tokens seen")
    trainable_parameters: int
    seconds: float
    details: dict[str, Any] = Field(
        default_factory=dict,
        description="steps, the stage's own losses; with a schedule `layers`, all converted by then; `data` of "
        "a stage that reads its own",
    )


class ConversionReport(BaseModel):
    """The whole of `report.json`. All losses are next-token losses on the same held-out tokens, in nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str
    recipe: str
    data: list[str] = Field(description="the data SPECs; the held-out part is drawn from them as the recipe says")
    heldout_tokens: int
    teacher_loss: float
    mixers: list[str | None] = Field(
        default_factory=list, description="by layer: its mixer, null where softmax attention stays"
    )
    swap_loss: float = Field(
        description="after the swap, before training; with a schedule after the swap of its first step, those of later "
        "steps are in their first stage's loss_before"
    )
    stages: list[StageReport]
    student_loss: float
    student_kl: float = Field(description="mean KL(teacher||student), nats per token")
    student_top1: float = Field(description="share of tokens where both have the same argmax")
    held_out: dict[str, Any] = Field(description="teacher and student in full: errors, perplexities, by position")
    ablation: dict[str, Any] | None = Field(None, description="loss of the window and of the linear branch alone")
    layer_error: dict[str, list[float]] = Field(
        default_factory=dict, description="error of each converted layer, in order, by moment of the conversion"
    )
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return self.model_dump(mode="json")

    def stage_names(self) -> list[str]:
        """The stages' names; where several have the same, each with its number among them: `distill #2`."""
        names = [stage.name for stage in self.stages]
        return [
            name if names.count(name) == 1 else f"{name} #{names[: i + 1].count(name)}" for i, name in enumerate(names)
        ]

    def moments(self) -> list[Moment]:
        """Every moment at which the held-out loss was measured: after each swap, and after each stage."""
        moments = [Moment("swap", self.swap_loss, None)]
        for name, stage in zip(self.stage_names(), self.stages, strict=True):
            if moments[-1].loss != stage.loss_before:  # a later step of a schedule has converted further layers
                moments.append(Moment("swap", stage.loss_before, None))
            moments.append(Moment(name, stage.loss_after, stage))
        return moments


class Moment(NamedTuple):
    """A moment of a conversion: `stage` is None after a swap, before training."""

    name: str
    loss: float
    stage: StageReport | None


def build_report(
    *,
    teacher: str,
    recipe: str,
    data: Sequence[str],
    swap_loss: float,
    stages: Sequence[StageReport],
    held_out: LanguageModelingReport,
    mixers: Sequence[str | None] = (),
    ablation: BranchAblation | None = None,
    layer_error: Mapping[str, Sequence[float]] | None = None,
    provenance: Mapping[str, Any],
) -> ConversionReport:
    """The report of a conversion. Raises ValueError unless `held_out` measured student and teacher side by side."""
    if held_out.teacher_loss is None or held_out.student_loss is None or held_out.student_kl is None:
        raise ValueError(
            "a conversion report needs student and teacher on the same tokens: pass both to held_out_report"
        )
    return ConversionReport(
        teacher=teacher,
        recipe=recipe,
        data=list(data),
        mixers=list(mixers),
        heldout_tokens=held_out.tokens,
        teacher_loss=held_out.teacher_loss,
        swap_loss=swap_loss,
        stages=list(stages),
        student_loss=held_out.student_loss,
        student_kl=held_out.student_kl,
        student_top1=held_out.student_top1,
        held_out=held_out.to_dict(),
        ablation=ablation.to_dict() if ablation is not None else None,
        layer_error={moment: list(errors) for moment, errors in (layer_error or {}).items()},
        provenance=dict(provenance),
    )


def stage_report(
    stage: StageConfig, result: StageResult, before: float, after: float, steps: Sequence[Sequence[int]], step: int
) -> StageReport:
    """What a stage did between two held-out losses. `steps`: of the plan's schedule, `step`: the stage's."""
    every = max(1, len(result.losses) // 200)
    details = {
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "losses": [list(x) for x in result.losses[::every]],
        "heldout": [list(x) for x in result.heldout],
        **({"metrics": {k: [list(x) for x in v] for k, v in result.metrics.items()}} if result.metrics else {}),
        **({"data": stage.data} if isinstance(stage, DatasetStageConfig) else {}),
    }
    scheduled = len(steps) > 1
    return StageReport(
        name=f"{stage.name} ({step + 1}/{len(steps)})" if scheduled and stage.at == "each" else stage.name,
        loss_before=before,
        loss_after=after,
        tokens=result.tokens,
        trainable_parameters=result.trainable_parameters,
        seconds=round(result.seconds, 2),
        details=details | ({"layers": list(steps[step])} if scheduled else {}),
    )


def write_report(report: ConversionReport, folder: Path | str) -> Path:
    """Write `report.json` into a folder; returns its path."""
    path = Path(folder) / FILE_NAME
    atomic_write_text(path, report.model_dump_json(indent=2) + "\n")
    return path


def read_report(folder: Path | str) -> ConversionReport | None:
    """The report in a student folder; None where there is none. Raises InputError for one that is not valid."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        return ConversionReport.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: no valid report, {where}: {first['msg']}; convert again or move it away") from error


def provenance(command: str | Sequence[str] | None = None, *, seed: int | None = None) -> dict[str, Any]:
    """The birth certificate of a measurement: command, versions, hardware, seed, date.

    `command` defaults to the running program's own command line. `commit` is None unless the package runs from a git
    checkout of its own.
    """
    if command is None:
        command = [Path(sys.argv[0]).name, *without_token(sys.argv[1:])]
    return {
        "command": command if isinstance(command, str) else shlex.join(command),
        "package_version": _version("linearize"),
        **_source_commit(),
        "libraries": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "hardware": hardware(),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def without_token(arguments: Sequence[str]) -> list[str]:
    """A command's arguments with `...` for a token of the Hub."""
    hidden = list(arguments)
    for place, argument in enumerate(arguments):
        if argument.startswith("--token="):
            hidden[place] = "--token=..."
        elif place and arguments[place - 1] == "--token":
            hidden[place] = "..."
    return hidden


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _source_commit() -> dict[str, Any]:
    """Commit of the checkout that the package's own source is in, and whether tracked files differ from it."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists() or not (root / "src" / "linearize").is_dir():
        return {"commit": None, "modified": None}
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": None if commit is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, cores, threads of torch, GPUs and operating system."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "platform": platform.platform(),
    }
