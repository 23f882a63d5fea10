"""A conversion in memory: the steps of the schedule, the stages of each step, and the measurements between them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from linearize.conversion.blockwise import load_trained_blocks, train_loaded_blocks
from linearize.conversion.outputs import write_student_files
from linearize.conversion.prepare import Prepared
from linearize.conversion.request import BlockOptions, is_blockwise
from linearize.conversion.text import calibration_batches
from linearize.metrics.branches import window_reach
from linearize.metrics.language_model import (
    BranchAblation,
    LanguageModelingReport,
    ablation_of,
    ablation_views,
    loss_only,
    report_of,
)
from linearize.metrics.layer_error import layer_errors
from linearize.metrics.report import (
    ConversionReport,
    StageReport,
    build_report,
    provenance,
    stage_report,
)
from linearize.metrics.token_scores import View, score_batches
from linearize.modeling.attention_capture import calibrate, to_calibrate
from linearize.modeling.io.adapter_folder import save_adapter_folder
from linearize.modeling.io.assemble import whole_student
from linearize.modeling.io.student_folder import save_student
from linearize.phases import phase
from linearize.recipes.schedule import share_of
from linearize.training.blockwise.block_result import BlockResult
from linearize.training.blockwise.hidden_rows import StageRows
from linearize.training.config import BlockwiseConfig, StageConfig
from linearize.training.data.loading import batches
from linearize.training.dataset_stage import DatasetStageConfig, StageJob
from linearize.training.distributed import current
from linearize.training.loop import StageResult, run_stage
from linearize.training.progress import Progress
from linearize.training.stages.attention_transfer import AttentionTransferConfig
from linearize.training.step import Stage, computed_on
from linearize.training.tracking import Tracker

LAYER_ERROR_TOKENS = 1024
CALIBRATION_NUMBERS = 2**26
"""Tokens times width of the samples that are in memory at once; a sample has several tensors of that size."""
LOG = logging.getLogger("linearize")


class Conversion:
    """A conversion of models in memory: for each step of the schedule the stages, with measurements between them."""

    def __init__(
        self,
        prepared: Prepared,
        specs: Sequence[str],
        work: Path,
        progress: Progress,
        tracker: Tracker,
        blocks: BlockOptions | None = None,
        trained: Sequence[BlockResult] = (),
        callbacks: Sequence[object] = (),
    ) -> None:
        """`trained`: the results of the block-wise stage, where its blocks were read from disk."""
        self.blocks, self.trained, self.callbacks = blocks or BlockOptions(), trained, callbacks
        self.prepared, self.specs, self.work, self.progress, self.tracker = prepared, specs, work, progress, tracker
        self.recipe, self.student, self.teacher = prepared.recipe, prepared.student, prepared.teacher
        self.steps, self.heldout = prepared.steps, prepared.heldout
        length = self.recipe.data.length
        self.identity = {
            "teacher_weights": prepared.teacher_weights,
            "data": prepared.text.fingerprint(length, self.heldout),
            "seed": self.recipe.seed,
            **self._draft(),
        }
        self.report: LanguageModelingReport | None = None
        self.ablation: BranchAblation | None = None
        self.before: dict[str, Any] = {}
        self.losses: list[float] = []
        self.errors: dict[str, list[float]] = {}
        self.stages: list[StageReport] = []

    def run(self) -> ConversionReport:
        """Run all steps and their stages, measure before and after each, and return the report."""
        for step in range(len(self.steps)):
            self._start_step(step)
            stages = self._stages_of(step)
            self._measure("swap", step, final=not stages and step == len(self.steps) - 1)
            for number in stages:
                self._run_stage(number, step, final=number == stages[-1] and step == len(self.steps) - 1)
        assert self.report is not None
        return build_report(
            teacher=self.prepared.name,
            recipe=self.recipe.name,
            data=self.specs,
            mixers=[None if mixer is None else str(mixer["name"]) for mixer in self.student.config.plan],
            swap_loss=self.losses[0],
            stages=self.stages,
            held_out=self.report,
            ablation=self.ablation,
            layer_error={k: v for k, v in self.errors.items() if v},
            provenance=provenance(seed=self.recipe.seed)
            | self._choices()
            | self._processes()
            | self.prepared.source.pinned,
        )

    def check_blocks(self) -> None:
        """Refuse block-wise stages that do not fit into memory or disk. Raises InputError."""
        for number, stage in enumerate(self.recipe.stages):
            if is_blockwise(stage) and not self.trained:
                self._blockwise(number, 0, check_only=True)

    def train_blocks(self) -> None:
        """Train the blocks of the first stage that `blocks.only` names; a call without it assembles the student."""
        self._start_step(0)
        self._blockwise(next(i for i, stage in enumerate(self.recipe.stages) if stage.tokens != 0), 0)

    def write(self, folder: Path | None, report: ConversionReport, *, adapter_only: bool = False) -> None:
        """Write weights (or the adapter alone), tokenizer, recipe, report, plots and model card into an empty folder.

        `folder` is None on all ranks but the first; they contribute their shards of the weights.
        """
        source, student = self.prepared.source, self.student
        if self.recipe.base_weights != "full":
            student = whole_student(student, source.path)
        if adapter_only and folder is not None:
            save_adapter_folder(student, self.prepared.tokenizer, folder, teacher=source.path, commit=source.commit)
        else:
            save_student(student, self.prepared.tokenizer, folder)
        if folder is not None:
            write_student_files(report, self.recipe, student.config.to_dict(), folder)

    def _start_step(self, step: int) -> None:
        """Convert the layers of this step (those of the first already are) and calibrate the mixers that need it."""
        torch.manual_seed(self.recipe.seed + step)
        before = self.steps[step - 1] if step else ()
        new = [layer for layer in self.steps[step] if layer not in before]
        if step:
            mixers = ((layer, self.prepared.plan[layer]) for layer in new)
            self.student.convert_layers({layer: mixer for layer, mixer in mixers if mixer is not None})
        asking = to_calibrate(self.student, new)
        if not asking:
            return
        sample = calibration_batches(self.recipe, self.prepared.text, self.student.device)
        tokens = sum(batch["input_ids"].numel() for batch in sample)
        at_once = max(1, CALIBRATION_NUMBERS // (tokens * self.student.config.get_text_config().hidden_size))
        with phase("calibrating mixers", len(asking), "layers") as advance:
            for first in range(0, len(asking), at_once):  # samples of all layers may not fit into memory
                layers = asking[first : first + at_once]
                calibrate(self.student, self.prepared.layer_teacher, sample, layers)
                advance(len(layers))

    def _stages_of(self, step: int) -> list[int]:
        """The numbers of the stages that run at a step of the schedule."""
        numbers = []
        for number, stage in enumerate(self.recipe.stages):
            if stage.at == "last" and step < len(self.steps) - 1:
                continue
            if reason := self._why_skipped(stage):
                LOG.warning("stage %d (%s) is skipped: %s", number, stage.name, reason)
                continue
            numbers.append(number)
        return numbers

    def _run_stage(self, number: int, step: int, *, final: bool) -> None:
        """Run one stage at one step of the schedule, from its checkpoint if there is one."""
        stage, steps = self.recipe.stages[number], len(self.steps)
        share, part = share_of(stage, step, steps)
        key, identity = self._key(number, step), self._stage_identity()
        torch.manual_seed(self.recipe.seed + stage.seed)
        if isinstance(share, DatasetStageConfig):
            result = self._run_own_loop(self._on_this_device(number, share, step), key, identity)
        elif is_blockwise(share):
            result = load_trained_blocks(self.student, self.trained or self._blockwise(number, step), key)
        else:
            result = self._run_in_loop(self._on_this_device(number, share, step), key, identity, part)
        self.before[key] = share.settings()
        before = self.losses[-1]
        self._measure(key, step, final=final)
        self.stages.append(stage_report(stage, result, before, self.losses[-1], self.steps, step))

    def _key(self, number: int, step: int) -> str:
        """The name of a stage at a step of the schedule."""
        steps, name = len(self.steps), self.recipe.stages[number].name
        return f"{number}-{name}" if steps == 1 else f"{step + 1}of{steps}-{number}-{name}"

    def _stage_identity(self) -> dict[str, Any]:
        """What a stage depends on besides its own settings."""
        return {**self.identity, "plan": self.student.config.plan, "before": dict(self.before)}

    def _blockwise(self, number: int, step: int, *, check_only: bool = False) -> list[BlockResult]:
        """Train a stage block by block on its part of the rows; with `check_only` check that it fits and stop there."""
        share, part = share_of(self.recipe.stages[number], step, len(self.steps))
        stage = self._on_this_device(number, share, step, announce=not check_only)
        assert isinstance(stage, BlockwiseConfig)
        rows, key = self.prepared.text.rows(stage.length or self.recipe.data.length, *part), self._key(number, step)
        return train_loaded_blocks(
            stage, self.student, self.prepared.layer_teacher, StageRows(stage, rows, self.heldout), self.work / key,
            self.blocks, check_only=check_only, identity=self._stage_identity(), progress=self.progress,
            tracker=self.tracker, callbacks=self.callbacks, name=key,
        )  # fmt: skip

    def _run_in_loop(
        self, stage: StageConfig, key: str, identity: Mapping[str, Any], part: tuple[int, int]
    ) -> StageResult:
        """Run a stage in the common loop, on its part of the rows."""
        rows = self.prepared.text.rows(stage.length or self.recipe.data.length, *part)
        teacher = self.prepared.layer_teacher if stage.by_layer else self.teacher
        run, device, group = stage.build(self.student, teacher), self.student.device, current()

        def stream(start: int, rank: int = group.rank, ranks: int = group.ranks) -> Any:
            for batch in batches(rows, stage.batch, stage.seed, start_step=start, rank=rank, world_size=ranks):
                yield {name: x.to(device) for name, x in batch.items()}

        run.calibrate(next(stream(0, 0, 1)))  # on all rows of the batch, so that every rank measures the same
        more: dict[str, str] = getattr(run, "identity", dict)()
        return run_stage(
            run, stage, stream, self.heldout, length=rows.length, checkpoint_dir=self.work / key,
            identity={**identity, **more}, name=key, progress=self.progress, tracker=self.tracker,
            callbacks=self.callbacks,
        )  # fmt: skip

    def _on_this_device(self, number: int, stage: Stage, step: int, *, announce: bool = True) -> Stage:
        """The stage, in fp32 where bf16 would be slower, which is printed once."""
        computed = computed_on(stage, self.student.device)
        if computed is not stage and announce and (step == 0 or stage.at == "last"):
            note(f"stage {number}: this CPU has no bf16 units, so bf16 would be slower: computing in fp32")
        return computed

    def _run_own_loop(self, stage: DatasetStageConfig, key: str, identity: Mapping[str, Any]) -> StageResult:
        """Run a stage that has its own loop and data."""
        return stage.run(
            StageJob(
                student=self.student, teacher=self.teacher, tokenizer=self.prepared.tokenizer, folder=self.work / key,
                identity=identity, seed=self.recipe.seed, progress=self.progress, tracker=self.tracker,
                callbacks=self.callbacks, name=key,
            )
        )  # fmt: skip

    def _measure(self, moment: str, step: int, *, final: bool) -> None:
        """Record the held-out loss, and the error of each layer once all layers are converted; at the end of the
        conversion everything that the report says of the student."""
        if final:
            self.report, self.ablation = self._compare()
            assert self.report.student_loss is not None
            self.losses.append(self.report.student_loss)
        else:
            self.losses.append(loss_only(self.student, self.heldout)[0])
        teacher = self.prepared.layer_teacher
        if step == len(self.steps) - 1 and teacher is not None:
            rows = max(1, LAYER_ERROR_TOKENS // self.heldout[0]["input_ids"].shape[1])
            with phase("measuring the error of each layer"):
                batch = {name: tensor[:rows] for name, tensor in self.heldout[0].items()}
                self.errors[moment] = layer_errors(self.student, teacher, batch)

    def _compare(self) -> tuple[LanguageModelingReport, BranchAblation | None]:
        """The student and its branches against the teacher, in one pass over the held-out text."""
        reach = window_reach(self.student.config.mixers())
        views = {"teacher": View(model=self.teacher), "student": View(model=self.student)}
        if reach:
            views |= ablation_views(self.student)
        scores = score_batches(self.heldout, views, reference="teacher")
        report = report_of(scores)
        return report, ablation_of(scores, window=reach) if reach else None

    def _why_skipped(self, stage: StageConfig) -> str | None:
        if stage.tokens == 0:
            return "its tokens are 0"
        if isinstance(stage, AttentionTransferConfig) and not self.student.mixer_parameters():
            return "no mixer of this plan has parameters to train"
        return None

    def _choices(self) -> dict[str, Any]:
        """For the report: the sensitivity of layers, the scores of heads, the steps of the schedule, the layers per
        streamed block, and the layers of a draft."""
        scores = [asdict(score) for score in self.prepared.scores]
        heads = [asdict(score) for score in self.prepared.heads]
        steps = [list(step) for step in self.steps]
        choices: dict[str, Any] = {"head_scores": heads} if heads else {}
        choices |= ({"layer_sensitivity": scores} if scores else {}) | ({"schedule": steps} if len(steps) > 1 else {})
        streamed = {"streamed": {"block": len(self.trained[0].layers)}} if self.trained else {}
        return choices | streamed | self._draft()

    def _draft(self) -> dict[str, Any]:
        """For the report of a draft: the target's layers that it has, and how many the target has."""
        depth = self.teacher.config.get_text_config().num_hidden_layers
        return {} if self.prepared.layers is None else {"draft": {"layers": list(self.prepared.layers), "of": depth}}

    def _processes(self) -> dict[str, Any]:
        ranks = current().ranks
        return {"processes": ranks} if ranks > 1 else {}


def note(line: str) -> None:
    """Print one line on stderr, from the first process alone."""
    if not current().leads:
        return
    print(f"linearize: {line}", file=sys.stderr)
