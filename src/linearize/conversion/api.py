"""`linearize.convert`: teacher, recipe and data in, one stage after the other, student folder out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from linearize.conversion.distributed import check_processes, run_signature, shard_models
from linearize.conversion.outputs import student_folder
from linearize.conversion.prepare import prepare
from linearize.conversion.prepare_streamed import block_stage
from linearize.conversion.request import ConversionRequest, is_blockwise, read_request
from linearize.conversion.run import Conversion
from linearize.conversion.streamed import StreamedConversion, train_streamed_blocks
from linearize.conversion.work_folder import is_written, log_folder, make_work
from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM, load
from linearize.phases import shown
from linearize.recipes.schema import DEFAULT_RECIPE, Recipe
from linearize.storage.atomic import check_free, discard
from linearize.storage.disk import writing
from linearize.storage.locks import output_lock
from linearize.training.blockwise.block_result import BlockResult
from linearize.training.checkpoint import check_formats
from linearize.training.distributed import Group, start
from linearize.training.progress import Progress, make_progress
from linearize.training.tracking import Tracker, make_tracker


def convert(
    teacher: str | os.PathLike[str],
    *,
    data: Sequence[str | os.PathLike[str]] | str = (),
    out: str | os.PathLike[str],
    recipe: str | Recipe = DEFAULT_RECIPE,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    adapter_only: bool = False,
    device: str | None = None,
    track: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    blocks: str | None = None,
    stream: bool = False,
    memory: int | str | None = None,
    disk: int | str | None = None,
) -> LinearizedForCausalLM | None:
    """Convert a teacher into a student, write the student's folder, and return the student loaded from it.

    Everything is checked before any work. A call that was killed continues from `.OUT.run` next to the folder, which is
    removed at the end; a second call at the same time with the same `out` is refused.

    A recipe with `plan.depth` (as `draft`) makes a draft: some of the layers of `teacher`, which may be a student
    itself. A `data.length` beyond the teacher's context becomes that context, unless `overrides` set it.

    With `block` in the recipe's first stage (`stages.0.block=4`, or `auto`) the layers are trained block by block, on
    hidden states of the teacher that are saved in `.OUT.run`. With `stream`, or under torchrun, which shares the blocks
    among its processes, these blocks are read from disk, and the whole model is in memory for later stages alone;
    where no stage follows it never is, and None is returned.

    Args:
        teacher: folder or Hub name.
        data: SPECs: files, folders, Hub data sets, or `self`; none: `data.sources` of the recipe.
        out: folder for the student; it must not exist unless `overwrite`.
        recipe: a name, a YAML file or a `Recipe`.
        overrides: dotted recipe keys and their values.
        adapter_only: write mixers and LoRA alone, pinned to the teacher's weights: `load(teacher, adapter=out)`.
        blocks: train these blocks of the first stage alone (`0-3,7`, counted from 0, or `all`: whatever no other
            process trains) and return None; the same call without `blocks` makes the student. Any number of processes
            and machines that see `.OUT.run` may do so at once.
        stream: read the teacher block by block: it need not fit into memory.
        memory, disk: what block-wise training and its hidden states may use, in bytes or like `24GB`; None: what is
            free.

    Raises:
        InputError: an argument that cannot be used; RuntimeError: training diverged; OSError: the disk is full.
    """
    request = read_request(
        teacher, data=data, out=out, recipe=recipe, overrides=overrides, blocks=blocks, stream=stream, memory=memory,
        disk=disk, overwrite=overwrite, adapter_only=adapter_only, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    final, group = request.final, start()
    check_processes(request.recipe, group)
    if adapter_only and group.ranks > 1:
        raise InputError("--adapter-only is for one process: leave it out, or convert without torchrun")
    reading = {"way of reading (--stream)": str(stream), "choice of blocks (--blocks)": str(blocks)}
    group.agree(run_signature(request.teacher, request.specs, request.recipe, final) | reading)
    from_disk = stream or (group.ranks > 1 and any(map(is_blockwise, request.recipe.stages)))
    if from_disk:
        block_stage(request.recipe)
    lock = output_lock(final, shared=request.only_blocks) if group.leads else nullcontext()
    phases = shown() if group.leads else nullcontext()
    with lock, phases, writing("what the conversion keeps", final.parent):
        if group.share(lambda: _already_written(request)):
            return load(final, device=device) if request.needs_whole else None
        tracker = make_tracker(log_folder(request.work, group), track if group.leads else ())
        progress = progress or make_progress()
        streamed, parts = train_streamed_blocks(request, group, tracker, progress) if from_disk else (None, [])
        if request.needs_whole:
            return _finish_in_memory(_load(request, group, tracker, progress, parts), request, group)
        if not request.only_blocks:
            assert streamed is not None
            _finish_on_disk(streamed, parts, request, group)
        elif not from_disk:
            _load(request, group, tracker, progress).train_blocks()
    return None


def _already_written(request: ConversionRequest) -> bool:
    """Whether an earlier run of the same call wrote the student. Raises InputError where its folder is not free."""
    if not request.only_blocks:
        return is_written(request.final, request.work, request.identity, request.overwrite)
    check_free(request.final, request.overwrite)
    check_formats(request.work)
    return False


def _load(
    request: ConversionRequest, group: Group, tracker: Tracker, progress: Progress, trained: Sequence[BlockResult] = ()
) -> Conversion:
    """The conversion with its models in memory, checked, and its work folder. `trained`: see `Conversion`."""
    prepared = group.share(
        lambda: prepare(
            request.teacher, request.recipe, request.specs, device=request.device, overridden=request.overridden,
            trust_remote_code=request.trust_remote_code, stage_on_cpu=group.ranks > 1,
        )
    )  # fmt: skip
    prepared = shard_models(prepared, group, request.device)
    conversion = Conversion(prepared, request.specs, request.work, progress, tracker, request.options, trained)
    conversion.check_blocks()
    make_work(request.work, request.final)
    return conversion


def _finish_in_memory(conversion: Conversion, request: ConversionRequest, group: Group) -> LinearizedForCausalLM:
    """Run all stages on the models in memory, write the student's folder and return the student."""
    report = conversion.run()
    with student_folder(request, group) as folder:
        conversion.write(folder, report, adapter_only=request.adapter_only)
    group.wait()
    student = load(request.final, device=request.device) if group.ranks == 1 else conversion.student
    if group.leads:
        discard(request.work)
    return student


def _finish_on_disk(
    conversion: StreamedConversion, parts: Sequence[BlockResult], request: ConversionRequest, group: Group
) -> None:
    """Write the student's folder, on the first process, from trained blocks and the teacher's files."""
    if group.leads:
        report = conversion.measure(parts)
        with student_folder(request, group) as folder:
            assert folder is not None
            conversion.write(folder, report, parts)
        discard(request.work)
    group.wait()
