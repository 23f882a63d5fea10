"""A streamed conversion: the teacher is read from disk block by block, and the student is written tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from linearize.conversion.blockwise import block_tensors, calibrate_block
from linearize.conversion.outputs import write_student_files
from linearize.conversion.prepare_streamed import StreamedPrepared, prepare_streamed
from linearize.conversion.request import BlockOptions, ConversionRequest, parse_blocks
from linearize.conversion.sizes import check_whole, chosen_block
from linearize.conversion.text import calibration_batches
from linearize.conversion.work_folder import make_work
from linearize.metrics.branches import window_reach
from linearize.metrics.intervals import mean_over_documents
from linearize.metrics.language_model import BranchAblation, ablation_of, report_of
from linearize.metrics.layer_error import layer_errors
from linearize.metrics.report import ConversionReport, build_report, provenance, stage_report
from linearize.metrics.streamed import StreamedForward, StreamedModel, put
from linearize.metrics.token_scores import score_batches
from linearize.modeling.blocks import Block
from linearize.modeling.io.assemble import write_student_weights
from linearize.modeling.io.streamed_teacher import StreamedBlocks
from linearize.training.blockwise.block_result import BlockResult, merge_results
from linearize.training.blockwise.hidden_rows import StageRows
from linearize.training.blockwise.relay import CallbackRelay
from linearize.training.blockwise.run import BlockJob, BlockwiseStage, release_memory
from linearize.training.callbacks import StopTraining
from linearize.training.config import Batch
from linearize.training.distributed import Group
from linearize.training.progress import Progress
from linearize.training.tracking import Tracker

LOG = logging.getLogger("linearize")


def train_streamed_blocks(
    request: ConversionRequest, group: Group, tracker: Tracker, progress: Progress, callbacks: Sequence[object] = ()
) -> tuple[StreamedConversion, list[BlockResult]]:
    """Train the blocks that the request names, shared among the processes, and return their results.

    Raises:
        InputError: an argument that cannot be used, or does not fit; RuntimeError: training diverged; OSError: the disk
            is full; StopTraining: a callback asked to stop, on all processes.
    """
    prepared = prepare_streamed(
        request.source, request.recipe, request.specs, device=request.device, overridden=request.overridden
    )
    conversion = StreamedConversion(
        prepared, request.specs, request.work, progress, tracker, request.options, callbacks, group
    )
    if request.needs_whole:
        names = [stage.name for stage in prepared.recipe.stages[prepared.number + 1 :] if stage.tokens != 0]
        check_whole(prepared.student, prepared.teacher.device, names, request.options.memory, group.ranks)
    if group.leads:
        make_work(request.work, request.final)
        conversion.stage()  # writes the run's identity before other processes read it
    group.wait()
    return conversion, conversion.train_blocks()


class StreamedConversion:
    """A conversion whose models are never in memory as a whole: train blocks, measure, write."""

    def __init__(
        self,
        prepared: StreamedPrepared,
        specs: Sequence[str],
        work: Path,
        progress: Progress,
        tracker: Tracker,
        options: BlockOptions,
        callbacks: Sequence[object] = (),
        group: Group | None = None,
    ) -> None:
        """`group`: the processes that share the blocks. Raises InputError: no block, or not the block of the recipe,
        fits into memory and disk."""
        self.prepared, self.specs, self.work, self.progress, self.tracker = prepared, specs, work, progress, tracker
        self.group = group or Group()
        self.relay = CallbackRelay(callbacks, self.group) if callbacks and self.group.ranks > 1 else None
        self.callbacks = callbacks if self.relay is None else [self.relay]
        self.recipe, self.config = prepared.recipe, prepared.student.config
        self.source = StreamedBlocks(prepared.teacher, self.config, seed=self.recipe.seed)
        self.key = f"{prepared.number}-{prepared.stage.name}"
        length = prepared.stage.length or self.recipe.data.length
        self.rows = StageRows(prepared.stage, prepared.text.rows(length), prepared.heldout, self._sample())
        folder = work / self.key
        self.block = chosen_block(prepared.stage, prepared.student, self.source, self.rows, options, folder=folder)
        count = -(-self.source.layers // self.block)
        self.only = None if options.only is None else parse_blocks(options.only, count)

    def stage(self) -> BlockwiseStage:
        """The block-wise stage."""
        identity = {
            "teacher_weights": self.prepared.teacher.files.fingerprint(),
            "data": self.prepared.text.fingerprint(self.recipe.data.length, self.prepared.heldout),
            "seed": self.recipe.seed,
            "plan": self.config.plan,
        }
        return BlockwiseStage(
            BlockJob(
                stage=self.prepared.stage, block=self.block, source=self.source, rows=self.rows,
                folder=self.work / self.key, identity=identity, only=self.only,
                calibrate=calibrate_block if self.rows.sample else None,
                progress=self.progress, tracker=self.tracker, callbacks=self.callbacks,
                between=None if self.relay is None else self.relay.check, name=self.key,
            )
        )  # fmt: skip

    def train_blocks(self) -> list[BlockResult]:
        """Train the blocks by leases, as processes do that were not started together.

        Raises as `BlockwiseStage.run`; StopTraining on all processes or on none.
        """
        parts: list[BlockResult] = []
        if self.relay is None:
            parts = self.stage().run()
            self.group.wait()
            return parts
        with suppress(StopTraining):
            parts = self.stage().run()
        self.group.wait()
        if self.group.leads:
            self.relay.receive()
        self.group.wait()
        if self.relay.stopped():
            raise StopTraining(f"in {self.key}")
        return parts

    def measure(self, parts: Sequence[BlockResult]) -> ConversionReport:
        """Measure teacher, student before and after training, and its branches, on the held-out rows."""
        reach = window_reach(self.config.mixers())
        models = {
            "teacher": StreamedModel(),
            "swap": StreamedModel(mixers="start"),
            "student": StreamedModel(mixers="final"),
        }
        if reach:
            models |= {branch: StreamedModel(mixers="final", branch=branch) for branch in ("window", "linear")}
        forward = StreamedForward(models=models, batches=self.prepared.heldout, folder=self.work / "forward")
        errors = self._forward(forward, parts)
        head = self.source.head(self.source.hidden_input.as_tuple)
        batches = forward.numbered()
        swap, student = (self._loss(forward, head, batches, name) for name in ("swap", "student"))
        scores = score_batches(batches, forward.views(head, "teacher", "student"), reference="teacher", rows=1)
        result = merge_results(parts, self.key)
        report = build_report(
            teacher=self.prepared.name,
            recipe=self.recipe.name,
            data=self.specs,
            mixers=[None if mixer is None else str(mixer["name"]) for mixer in self.config.plan],
            swap_loss=swap,
            stages=[stage_report(self.prepared.stage, result, swap, student, [list(range(self.source.layers))], 0)],
            held_out=report_of(scores),
            ablation=self._ablation(forward, head, batches, reach),
            layer_error={moment: values for moment, values in errors.items() if values},
            provenance=provenance(seed=self.recipe.seed)
            | {"streamed": {"block": self.block}}
            | self.prepared.source.pinned,
        )
        forward.remove()
        return report

    def write(self, folder: Path, report: ConversionReport, parts: Sequence[BlockResult]) -> None:
        """Write weights, tokenizer, recipe, report, plots and model card into an empty folder."""
        by_layer = {layer: part for part in parts for layer in part.layers}
        prefix = f"lm.{self.prepared.teacher.layers}."

        def mixers(layer: int) -> Mapping[str, Tensor]:
            start = f"{prefix}{layer}."
            return {name: value for name, value in by_layer[layer].final.items() if name.startswith(start)}

        write_student_weights(self.prepared.teacher, self.prepared.student, mixers, folder)
        self.prepared.teacher.tokenizer.save_pretrained(folder)
        write_student_files(report, self.recipe, self.config.to_dict(), folder)

    def _forward(self, forward: StreamedForward, parts: Sequence[BlockResult]) -> dict[str, list[float]]:
        """Pass all models through all blocks; returns the errors of layers before and after training."""
        errors: dict[str, list[float]] = {"swap": [], self.key: []}
        forward.enter(self.source.enter(), self.source.model_dim, self.prepared.teacher.dtype)
        release_memory()
        for part in parts:
            block = self.source.pair(part.layers)
            mixers = {"start": block_tensors(block, part.start), "final": block_tensors(block, part.final)}
            for moment, which in (("swap", "start"), (self.key, "final")):
                errors[moment] += self._layer_errors(block, mixers[which], forward)
            forward.through(block, mixers)
            del block
            release_memory()
        return errors

    def _layer_errors(self, block: Block, mixers: Mapping[str, Tensor], forward: StreamedForward) -> list[float]:
        put(block, mixers)
        assert block.student is not None
        with block.hidden_input.holding(block.placed(forward.first("teacher"))):
            return layer_errors(block.student, block.teacher, self.prepared.heldout[0])

    def _loss(self, forward: StreamedForward, head: Any, batches: Sequence[Batch], name: str) -> float:
        scores = score_batches(batches, forward.views(head, name), rows=1)
        return mean_over_documents(scores.loss[name], scores.documents).value

    def _ablation(
        self, forward: StreamedForward, head: Any, batches: Sequence[Batch], reach: int | None
    ) -> BranchAblation | None:
        if not reach:
            return None
        views = forward.views(head, "student", "window", "linear", "teacher")
        return ablation_of(score_batches(batches, views, rows=1), window=reach)

    def _sample(self) -> list[Batch]:
        """The rows that calibrate mixers; none where no mixer asks for it."""
        asks = any(getattr(mixer, "initialise", None) == "calibrate" for mixer in self.config.mixers())
        return calibration_batches(self.recipe, self.prepared.text) if asks else []
