"""Blocks of a teacher whose weights are read from the disk, block by block, and a student that is never in memory as a
whole: everything else lies on the disk, and its folder is written tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.conversion.options import BlockOptions, parse_blocks
from linearize.conversion.outputs import write_papers
from linearize.conversion.prepare import CALIBRATION_TOKENS, EVALUATION_BATCH
from linearize.conversion.prepare_streamed import StreamPrepared, prepare_stream
from linearize.conversion.request import Request
from linearize.conversion.sizes import check_whole, chosen_block
from linearize.conversion.work_folder import make_work
from linearize.metrics.branches import window_reach
from linearize.metrics.intervals import mean_over_documents
from linearize.metrics.language_model import BranchAblation, ablation_of, report_of
from linearize.metrics.layer_error import layer_errors
from linearize.metrics.report import ConversionReport, build_report, provenance, stage_report
from linearize.metrics.streamed import StreamedForward, StreamedModel, put
from linearize.metrics.token_scores import score_batches
from linearize.modeling.attention_capture import attention_samples
from linearize.modeling.blocks import Block
from linearize.modeling.io.assemble import write_student_weights
from linearize.modeling.io.streamed_teacher import StreamedBlocks
from linearize.training.blockwise.block_result import BlockResult, merge_results
from linearize.training.blockwise.hidden_rows import HIDDEN, StageRows
from linearize.training.blockwise.run import BlockJob, BlockwiseStage, release_memory, whole_name
from linearize.training.config import Batch
from linearize.training.distributed import Group
from linearize.training.progress import Progress
from linearize.training.tracking import Tracker

LOG = logging.getLogger("linearize")


def train_parts(
    request: Request, group: Group, tracker: Tracker, progress: Progress
) -> tuple[StreamedConversion, list[BlockResult]]:
    """Train the blocks that the request names, those of many processes shared out; returns their parts.

    Raises:
        InputError: anything that cannot be used, or does not fit; RuntimeError: training diverged; OSError: disk full.
    """
    given = prepare_stream(
        request.teacher, request.recipe, request.specs, device=request.device, asked=request.asked,
        trust_remote_code=request.trust_remote_code,
    )  # fmt: skip
    conversion = StreamedConversion(given, request.specs, request.work, progress, tracker, request.options)
    if request.needs_whole:
        names = [stage.name for stage in given.recipe.stages[given.number + 1 :] if stage.tokens != 0]
        check_whole(given.student, given.teacher.device, names, request.options.memory, group.ranks)
    if group.leads:
        make_work(request.work, request.final)
        conversion.stage()  # says whose folder it is before others look
    group.wait()
    parts = conversion.stage().run()  # processes started together share out the blocks as all others do
    group.wait()
    return conversion, parts


class StreamedConversion:
    """A streamed conversion on its way."""

    def __init__(
        self,
        given: StreamPrepared,
        specs: Sequence[str],
        work: Path,
        progress: Progress,
        tracker: Tracker,
        options: BlockOptions,
    ) -> None:
        """Raises InputError: memory or disk that no block, or not this one, fits into."""
        self.given, self.specs, self.work, self.progress, self.tracker = given, specs, work, progress, tracker
        self.recipe, self.config = given.recipe, given.student.config
        self.source = StreamedBlocks(given.teacher, self.config, seed=self.recipe.seed)
        self.key = f"{given.number}-{given.stage.name}"
        length = given.stage.length or self.recipe.data.length
        self.rows = StageRows(given.stage, given.text.rows(length), given.heldout, self._sample())
        folder = work / self.key
        self.block = chosen_block(given.stage, given.student, self.source, self.rows, options, folder=folder)
        count = -(-self.source.layers // self.block)
        self.only = None if options.only is None else parse_blocks(options.only, count)

    def stage(self) -> BlockwiseStage:
        """The block-wise stage."""
        identity = {
            "teacher_weights": self.given.teacher.files.fingerprint(),
            "data": self.given.text.fingerprint(self.recipe.data.length, self.given.heldout),
            "seed": self.recipe.seed,
            "plan": self.config.plan,
        }
        return BlockwiseStage(
            BlockJob(
                stage=self.given.stage, block=self.block, source=self.source, rows=self.rows,
                folder=self.work / self.key, identity=identity, only=self.only,
                calibrate=calibrate_block if self.rows.sample else None,
                progress=self.progress, tracker=self.tracker, name=self.key,
            )
        )  # fmt: skip

    def measure(self, parts: Sequence[BlockResult]) -> ConversionReport:
        """Teacher, the student before training and after it, and its branches, on the held-out rows."""
        reach = window_reach(self.config.mixers())
        models = {
            "teacher": StreamedModel(),
            "swap": StreamedModel(mixers="start"),
            "student": StreamedModel(mixers="final"),
        }
        if reach:
            models |= {branch: StreamedModel(mixers="final", branch=branch) for branch in ("window", "linear")}
        forward = StreamedForward(models=models, batches=self.given.heldout, folder=self.work / "forward")
        errors = self._forward(forward, parts)
        head = self.source.head(self.source.hidden_input.as_tuple)
        batches = forward.numbered()
        swap, student = (self._loss(forward, head, batches, name) for name in ("swap", "student"))
        scores = score_batches(batches, forward.views(head, "teacher", "student"), reference="teacher", rows=1)
        result = merge_results(parts, self.key)
        report = build_report(
            teacher=self.given.name,
            recipe=self.recipe.name,
            data=self.specs,
            mixers=[None if mixer is None else str(mixer["name"]) for mixer in self.config.plan],
            swap_loss=swap,
            stages=[stage_report(self.given.stage, result, swap, student, [list(range(self.source.layers))], 0)],
            held_out=report_of(scores),
            ablation=self._ablation(forward, head, batches, reach),
            layer_error={moment: found for moment, found in errors.items() if found},
            provenance=provenance(seed=self.recipe.seed) | {"streamed": {"block": self.block}},
        )
        forward.remove()
        return report

    def write(self, folder: Path, report: ConversionReport, parts: Sequence[BlockResult]) -> None:
        """Weights, tokenizer, recipe, report, plots and model card into an empty folder."""
        by_layer = {layer: part for part in parts for layer in part.layers}
        prefix = f"lm.{self.given.teacher.layers}."

        def mixers(layer: int) -> Mapping[str, Tensor]:
            start = f"{prefix}{layer}."
            return {name: value for name, value in by_layer[layer].final.items() if name.startswith(start)}

        write_student_weights(self.given.teacher, self.given.student, mixers, folder)
        self.given.teacher.tokenizer.save_pretrained(folder)
        write_papers(report, self.recipe, self.config.to_dict(), folder)

    def _forward(self, forward: StreamedForward, parts: Sequence[BlockResult]) -> dict[str, list[float]]:
        """All models through all blocks; returns the errors of layers before and after training."""
        errors: dict[str, list[float]] = {"swap": [], self.key: []}
        forward.enter(self.source.enter(), self.source.model_dim, self.given.teacher.dtype)
        release_memory()
        for part in parts:
            block = self.source.pair(part.layers)
            mixers = {"start": _in_block(block, part.start), "final": _in_block(block, part.final)}
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
            return layer_errors(block.student, block.teacher, self.given.heldout[0])

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
        """The rows that calibrate mixers, where some ask for it."""
        asks = any(getattr(mixer, "initialise", None) == "calibrate" for mixer in self.config.mixers())
        length = self.recipe.data.length
        return self.given.text.sample(length, CALIBRATION_TOKENS, EVALUATION_BATCH) if asks else []


def calibrate_block(block: Block, batches: Sequence[Batch]) -> None:
    """Calibrate those mixers of a block whose config asks for it, on batches with hidden states."""
    student = block.student
    assert student is not None
    for layer, mixer in student.mixers().items():
        if getattr(mixer.config, "initialise", None) != "calibrate":
            continue
        samples = []
        for batch in batches:
            placed = {name: value.to(block.device) for name, value in batch.items() if name != HIDDEN}
            with block.hidden_input.holding(block.placed(batch[HIDDEN])):
                sites = {layer: student.config.attention[layer]}
                samples += attention_samples(block.teacher, [placed], [layer], sites)[layer]
        with torch.no_grad():
            mixer.calibrate(samples)  # type: ignore[operator]


def _in_block(block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the whole student by their names in a block."""
    assert block.student is not None
    names = {whole_name(block, name): name for name in block.student.state_dict()}
    return {names[name]: value for name, value in tensors.items()}
