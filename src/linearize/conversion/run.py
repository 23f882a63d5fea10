"""`linearize convert`: teacher, recipe and data in, one stage after the other, student folder out."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from linearize.conversion.distributed import check_together, facts, share_out
from linearize.conversion.in_memory import run_loaded, take_parts
from linearize.conversion.options import BlockOptions, is_blockwise
from linearize.conversion.outputs import write_papers
from linearize.conversion.prepare import CALIBRATION_TOKENS, EVALUATION_BATCH, Prepared, prepare
from linearize.conversion.prepare_streamed import block_stage
from linearize.conversion.request import Request, read_request
from linearize.conversion.streamed import StreamedConversion, train_parts
from linearize.conversion.work_folder import is_written, log_folder, make_work, mark_ended
from linearize.metrics.branches import window_reach
from linearize.metrics.language_model import branch_ablation, held_out_report, loss_only
from linearize.metrics.layer_error import layer_errors
from linearize.metrics.report import (
    ConversionReport,
    StageReport,
    build_report,
    provenance,
    stage_report,
)
from linearize.modeling import LinearizedForCausalLM, load
from linearize.modeling.attention_capture import calibrate
from linearize.modeling.io.quantized import whole_student
from linearize.modeling.io.student_folder import save_student
from linearize.recipes.recipe import DEFAULT_RECIPE, Recipe
from linearize.recipes.schedule import share_of
from linearize.storage.disk import writing
from linearize.storage.files import atomic_folder, check_free, discard, output_lock
from linearize.training.blockwise.block_result import Part
from linearize.training.blockwise.rows import StageRows
from linearize.training.checkpoint import check_formats
from linearize.training.config import BlockwiseConfig, StageConfig
from linearize.training.data.loading import batches
from linearize.training.dataset_stage import DatasetStageConfig, StageJob
from linearize.training.distributed import Group, current, start
from linearize.training.loop import StageResult, run_stage
from linearize.training.progress import Progress, make_progress
from linearize.training.stages.attention_transfer import AttentionTransferConfig
from linearize.training.step import Stage, computed_on
from linearize.training.tracking import Tracker, make_tracker

LOG = logging.getLogger("linearize")


def convert(
    teacher: str | os.PathLike[str],
    *,
    data: Sequence[str | os.PathLike[str]] | str,
    out: str | os.PathLike[str],
    recipe: str | Recipe = DEFAULT_RECIPE,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    device: str | None = None,
    track: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    blocks: str | None = None,
    stream: bool = False,
    memory: int | str | None = None,
    disk: int | str | None = None,
) -> LinearizedForCausalLM | None:
    """Convert a teacher into a student and write the student's folder; returns the student, loaded from it.

    With `plan.depth` in the recipe (as in `draft`) the student is a draft: some of the layers of `teacher`, which may
    be a student itself.

    With `block` in the recipe's first stage (`stages.0.block=4`, or `auto`) its layers are trained block by block on
    hidden states of the teacher saved in `.OUT.run`; `blocks` has other processes do some of them. With `stream`, and
    where torchrun started several processes, which share them out, these blocks are read from the disk, and the model
    is in memory for the stages after them alone: without such stages it never is, and None is returned.

    Everything is checked before any work. Killed at any point, the same call continues from `.OUT.run` beside the
    folder, which is removed at the end; of two calls at once with the same `out` the second is refused. A recipe's
    `data.length` beyond the teacher's context becomes that context, unless `overrides` ask for it.

    Args:
        teacher: folder or Hub name. data: SPECs (files, Hub data sets, `self`). out: folder that must not exist
        unless `overwrite`.
        recipe: a name, a YAML file or a `Recipe`. overrides: dotted recipe keys.
        blocks: train these blocks of the first stage alone (`0-3,7`, from 0, or `all`: whatever no one else trains)
        and return None; the same call without `blocks` makes the student. Any number of processes and machines that
        see `.OUT.run` may do so at once.
        stream: read the teacher block by block: it need not fit into memory. memory, disk: what block-wise training
        and its hidden states may take, in bytes or as `24GB`; None: what is free.
    Raises:
        InputError: anything given that cannot be used; RuntimeError: training diverged; OSError: the disk is full.
    """
    request = read_request(
        teacher, data=data, out=out, recipe=recipe, overrides=overrides, blocks=blocks, stream=stream, memory=memory,
        disk=disk, overwrite=overwrite, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    final, group = request.final, start()
    check_together(request.recipe, group)
    way = {"way of reading (--stream)": str(stream), "choice of blocks (--blocks)": str(blocks)}
    group.agree(facts(request.teacher, request.specs, request.recipe, final) | way)
    from_disk = stream or (group.ranks > 1 and any(map(is_blockwise, request.recipe.stages)))
    if from_disk:
        block_stage(request.recipe)
    lock = output_lock(final, shared=request.only_blocks) if group.leads else nullcontext()
    with lock, writing("what the conversion keeps", final.parent):
        if group.share(lambda: _is_done(request)):
            return load(final, device=device) if request.needs_whole else None
        tracker = make_tracker(log_folder(request.work, group), track if group.leads else ())
        shown = progress or make_progress()
        streamed, parts = train_parts(request, group, tracker, shown) if from_disk else (None, [])
        if request.needs_whole:
            return _finish_in_memory(_load(request, group, tracker, shown, parts), request, group)
        if not request.only_blocks:
            assert streamed is not None
            _finish_on_disk(streamed, parts, request, group)
        elif not from_disk:
            _load(request, group, tracker, shown).train_blocks()
    return None


def _is_done(request: Request) -> bool:
    """Whether an earlier run of the same call wrote the student; else its folder is free. Raises InputError."""
    if not request.only_blocks:
        return is_written(request.final, request.work, request.wanted, request.overwrite)
    check_free(request.final, request.overwrite)
    check_formats(request.work)
    return False


def _load(
    request: Request, group: Group, tracker: Tracker, progress: Progress, trained: Sequence[Part] = ()
) -> Conversion:
    """The conversion with its models in memory, checked, and its work folder. `trained`: see `Conversion`."""
    prepared = group.share(
        lambda: prepare(
            request.teacher, request.recipe, request.specs, device=request.device, asked=request.asked,
            trust_remote_code=request.trust_remote_code, stage_on_cpu=group.ranks > 1,
        )
    )  # fmt: skip
    prepared = share_out(prepared, group, request.device)
    conversion = Conversion(prepared, request.specs, request.work, progress, tracker, request.options, trained)
    conversion.check_blocks()
    make_work(request.work, request.final)
    return conversion


def _finish_in_memory(conversion: Conversion, request: Request, group: Group) -> LinearizedForCausalLM:
    """All stages on the models in memory, then the student's folder; returns the student."""
    report = conversion.run()
    with _student_folder(request, group) as folder:
        conversion.write(folder, report)
    group.wait()
    student = load(request.final, device=request.device) if group.ranks == 1 else conversion.student
    if group.leads:
        discard(request.work)
    return student


def _finish_on_disk(conversion: StreamedConversion, parts: Sequence[Part], request: Request, group: Group) -> None:
    """The student's folder from trained blocks and the teacher's files, by the first process."""
    if group.leads:
        report = conversion.measure(parts)
        with _student_folder(request, group) as folder:
            assert folder is not None
            conversion.write(folder, report, parts)
        discard(request.work)
    group.wait()


@contextmanager
def _student_folder(request: Request, group: Group) -> Iterator[Path | None]:
    """The folder to write the student into, which gets its name with the log and a note in the end; None on ranks but
    the first."""
    if not group.leads:
        yield None
        return
    with atomic_folder(request.final, request.overwrite, locked=True) as folder:
        yield folder
        if (request.work / "log").is_dir():
            shutil.copytree(request.work / "log", folder / "log")
        mark_ended(folder, request.work, request.wanted)


class Conversion:
    """A conversion on its way: each step of the plan's schedule, at each step the stages, everything measured."""

    def __init__(
        self,
        prepared: Prepared,
        specs: Sequence[str],
        work: Path,
        progress: Progress,
        tracker: Tracker,
        blocks: BlockOptions | None = None,
        trained: Sequence[Part] = (),
    ) -> None:
        """`trained`: the parts of the block-wise stage, where its blocks were read from the disk."""
        self.blocks, self.trained = blocks or BlockOptions(), trained
        self.given, self.specs, self.work, self.progress, self.tracker = prepared, specs, work, progress, tracker
        self.recipe, self.student, self.teacher = prepared.recipe, prepared.student, prepared.teacher
        self.steps, self.heldout = prepared.steps, prepared.heldout
        length = self.recipe.data.length
        self.identity = {
            "teacher_weights": prepared.teacher_weights,
            "data": prepared.text.fingerprint(length, self.heldout),
            "seed": self.recipe.seed,
            **self._draft(),
        }
        self.before: dict[str, Any] = {}
        self.losses: list[float] = []
        self.errors: dict[str, list[float]] = {}
        self.stages: list[StageReport] = []

    def run(self) -> ConversionReport:
        """All steps and their stages, measured before and after each; returns the report."""
        for step in range(len(self.steps)):
            self._start_step(step)
            self._measure("swap", step)
            for number, stage in enumerate(self.recipe.stages):
                if stage.at == "last" and step < len(self.steps) - 1:
                    continue
                if reason := self._why_skipped(stage):
                    LOG.warning("stage %d (%s) is skipped: %s", number, stage.name, reason)
                    continue
                self._run_stage(number, step)
        return build_report(
            teacher=self.given.name,
            recipe=self.recipe.name,
            data=self.specs,
            mixers=[None if mixer is None else str(mixer["name"]) for mixer in self.student.config.plan],
            swap_loss=self.losses[0],
            stages=self.stages,
            held_out=held_out_report(self.student, self.teacher, self.heldout),
            ablation=self._ablation(),
            layer_error={k: v for k, v in self.errors.items() if v},
            provenance=provenance(seed=self.recipe.seed) | self._choices() | self._processes(),
        )

    def check_blocks(self) -> None:
        """Refuse block-wise stages that do not fit into memory or disk. Raises InputError."""
        for number, stage in enumerate(self.recipe.stages):
            if is_blockwise(stage) and not self.trained:
                self._blockwise(number, 0, check_only=True)

    def train_blocks(self) -> None:
        """The blocks of the first stage that `blocks.only` names, for a call without it to assemble."""
        self._start_step(0)
        self._blockwise(next(i for i, stage in enumerate(self.recipe.stages) if stage.tokens != 0), 0)

    def write(self, folder: Path | None, report: ConversionReport) -> None:
        """Weights, tokenizer, recipe, report, plots and model card into an empty folder; None on ranks but the first,
        which give their part of the weights."""
        student = whole_student(self.student) if self.recipe.base_weights != "full" else self.student
        save_student(student, self.given.tokenizer, folder)
        if folder is not None:
            write_papers(report, self.recipe, student.config.to_dict(), folder)

    def _start_step(self, step: int) -> None:
        """Convert the layers of this step (those of the first are already), and calibrate what asks for it."""
        torch.manual_seed(self.recipe.seed + step)
        before = self.steps[step - 1] if step else ()
        new = [layer for layer in self.steps[step] if layer not in before]
        if step:
            mixers = ((layer, self.given.plan[layer]) for layer in new)
            self.student.convert_layers({layer: mixer for layer, mixer in mixers if mixer is not None})
        text, length = self.given.text, self.recipe.data.length
        sample = text.sample(length, CALIBRATION_TOKENS, EVALUATION_BATCH, self.student.device)
        for layer in new:  # one at a time: the samples of all layers may not fit into memory
            calibrate(self.student, self.given.layer_teacher, sample, [layer])

    def _run_stage(self, number: int, step: int) -> None:
        """One stage at one step of the schedule, from its checkpoint if there is one."""
        stage, steps = self.recipe.stages[number], len(self.steps)
        share, part = share_of(stage, step, steps)
        key, identity = self._key(number, step), self._stage_identity()
        torch.manual_seed(self.recipe.seed + stage.seed)
        if isinstance(share, DatasetStageConfig):
            result = self._run_own_loop(self._on_this_device(number, share, step), key, identity)
        elif is_blockwise(share):
            result = take_parts(self.student, self.trained or self._blockwise(number, step), key)
        else:
            result = self._run_in_loop(self._on_this_device(number, share, step), key, identity, part)
        self.before[key] = share.settings()
        before = self.losses[-1]
        self._measure(key, step)
        self.stages.append(stage_report(stage, result, before, self.losses[-1], self.steps, step))

    def _key(self, number: int, step: int) -> str:
        """The name of a stage at a step of the schedule."""
        steps, name = len(self.steps), self.recipe.stages[number].name
        return f"{number}-{name}" if steps == 1 else f"{step + 1}of{steps}-{number}-{name}"

    def _stage_identity(self) -> dict[str, Any]:
        """What a stage depends on besides its own settings."""
        return {**self.identity, "plan": self.student.config.plan, "before": dict(self.before)}

    def _blockwise(self, number: int, step: int, *, check_only: bool = False) -> list[Part]:
        """A stage block by block, on its part of the rows; `check_only`: whether it fits, and nothing else."""
        share, part = share_of(self.recipe.stages[number], step, len(self.steps))
        stage = self._on_this_device(number, share, step, tell=not check_only)
        assert isinstance(stage, BlockwiseConfig)
        rows, key = self.given.text.rows(stage.length or self.recipe.data.length, *part), self._key(number, step)
        return run_loaded(
            stage, self.student, self.given.layer_teacher, StageRows(stage, rows, self.heldout), self.work / key,
            self.blocks, check_only=check_only, identity=self._stage_identity(), progress=self.progress,
            tracker=self.tracker, name=key,
        )  # fmt: skip

    def _run_in_loop(
        self, stage: StageConfig, key: str, identity: Mapping[str, Any], part: tuple[int, int]
    ) -> StageResult:
        """A stage in the common loop, on its part of the rows."""
        rows = self.given.text.rows(stage.length or self.recipe.data.length, *part)
        teacher = self.given.layer_teacher if stage.by_layer else self.teacher
        run, device, group = stage.build(self.student, teacher), self.student.device, current()

        def stream(start: int, rank: int = group.rank, ranks: int = group.ranks) -> Any:
            for batch in batches(rows, stage.batch, stage.seed, start_step=start, rank=rank, world_size=ranks):
                yield {name: x.to(device) for name, x in batch.items()}

        run.calibrate(next(stream(0, 0, 1)))  # on all rows of the batch, so that every rank measures the same
        more: dict[str, str] = getattr(run, "identity", dict)()
        return run_stage(
            run, stage, stream, self.heldout, length=rows.length, checkpoint_dir=self.work / key,
            identity={**identity, **more}, name=key, progress=self.progress, tracker=self.tracker,
        )  # fmt: skip

    def _on_this_device(self, number: int, stage: Stage, step: int, *, tell: bool = True) -> Stage:
        """The stage, in fp32 where bf16 would be slower; said once."""
        computed = computed_on(stage, self.student.device)
        if computed is not stage and tell and (step == 0 or stage.at == "last"):
            note(f"stage {number}: this CPU has no bf16 units, so bf16 would be slower: computing in fp32")
        return computed

    def _run_own_loop(self, stage: DatasetStageConfig, key: str, identity: Mapping[str, Any]) -> StageResult:
        """A stage with a loop and data of its own."""
        return stage.run(
            StageJob(
                student=self.student, teacher=self.teacher, tokenizer=self.given.tokenizer, folder=self.work / key,
                identity=identity, seed=self.recipe.seed, progress=self.progress, tracker=self.tracker, name=key,
            )
        )  # fmt: skip

    def _measure(self, moment: str, step: int) -> None:
        """The held-out loss now, and the layers' errors once all layers are converted."""
        self.losses.append(loss_only(self.student, self.heldout)[0])
        teacher = self.given.layer_teacher
        if step == len(self.steps) - 1 and teacher is not None:
            self.errors[moment] = layer_errors(self.student, teacher, self.heldout[0])

    def _why_skipped(self, stage: StageConfig) -> str | None:
        if stage.tokens == 0:
            return "its tokens are 0"
        if isinstance(stage, AttentionTransferConfig) and not self.student.mixer_parameters():
            return "no mixer of this plan has parameters to train"
        return None

    def _choices(self) -> dict[str, Any]:
        """For the report: which layers were chosen by what, the steps they were converted in, the layers of a block
        read from the disk, and those of a draft."""
        scores = [asdict(score) for score in self.given.scores]
        steps = [list(step) for step in self.steps]
        found = ({"layer_sensitivity": scores} if scores else {}) | ({"schedule": steps} if len(steps) > 1 else {})
        streamed = {"streamed": {"block": len(self.trained[0].layers)}} if self.trained else {}
        return found | streamed | self._draft()

    def _draft(self) -> dict[str, Any]:
        """Of a draft: its target's layers that it has, and how many the target has."""
        depth = self.teacher.config.get_text_config().num_hidden_layers
        return {} if self.given.layers is None else {"draft": {"layers": list(self.given.layers), "of": depth}}

    def _processes(self) -> dict[str, Any]:
        ranks = current().ranks
        return {"processes": ranks} if ranks > 1 else {}

    def _ablation(self) -> Any:
        reach = window_reach(self.student.config.mixers())
        return branch_ablation(self.student, self.heldout, window=reach, teacher=self.teacher) if reach else None


def note(line: str) -> None:
    """One line for people, on stderr; of many processes the first says it."""
    if not current().leads:
        return
    print(f"linearize: {line}", file=sys.stderr)
