"""`linearize.convert`: teacher, recipe and data in, one stage after the other, student folder out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.conversion.distributed import check_processes, run_signature, shard_models
from linearize.conversion.outputs import student_folder
from linearize.conversion.prepare import prepare
from linearize.conversion.prepare_streamed import block_stage
from linearize.conversion.request import ConversionRequest, is_blockwise, read_request
from linearize.conversion.run import Conversion, note
from linearize.conversion.source import DeviceMap
from linearize.conversion.streamed import StreamedConversion, train_streamed_blocks
from linearize.conversion.work_folder import is_written, log_folder, make_work
from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM, load
from linearize.modeling.io.hub import create_repository, upload
from linearize.phases import shown
from linearize.recipes.schema import DEFAULT_RECIPE, Recipe
from linearize.storage.atomic import check_free, discard
from linearize.storage.disk import writing
from linearize.storage.locks import output_lock
from linearize.training.blockwise.block_result import BlockResult
from linearize.training.callbacks import StopTraining, check_callbacks
from linearize.training.checkpoint import check_formats
from linearize.training.distributed import Group, start
from linearize.training.progress import Progress, make_progress
from linearize.training.tracking import Tracker, make_tracker


def convert(
    teacher: str | os.PathLike[str] | PreTrainedModel,
    *,
    data: Sequence[str | os.PathLike[str]] | str = (),
    out: str | os.PathLike[str],
    recipe: str | Recipe = DEFAULT_RECIPE,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    adapter_only: bool = False,
    self_contained: bool = False,
    push_to: str | None = None,
    private: bool | None = None,
    track: Sequence[str] = (),
    progress: Progress | None = None,
    callbacks: Sequence[object] = (),
    blocks: str | None = None,
    stream: bool = False,
    memory: int | str | None = None,
    disk: int | str | None = None,
) -> LinearizedForCausalLM | None:
    """Convert a teacher into a student, write the student's folder, and return the student loaded from it.

    Everything is checked before any work. A call that was killed continues from `.OUT.run` next to the folder, which is
    removed at the end. None is returned where no student is in memory: after `blocks`, a stop, a streamed conversion.
    See docs/scale.md for blocks, streams and several processes, `linearize recipes` for recipes.

    Args:
        teacher: folder, Hub name, or a causal LM in memory, which stays as it is; or a student, for a draft.
        data: SPECs: files, folders, Hub data sets, or `self`; none: `data.sources` of the recipe.
        out: folder for the student; it must not exist unless `overwrite`.
        recipe, overrides: a name, a YAML file or a `Recipe`; dotted keys of it and their values.
        tokenizer: of a teacher in memory; None: the one in the folder that it was loaded from.
        revision, token: of a Hub name, a branch, tag or commit, and what to read with (None: HF_TOKEN).
        dtype, device_map: to load the teacher with, as transformers takes them; a CPU computes in fp32.
        adapter_only: write mixers and LoRA alone, pinned to the teacher's weights: `load(teacher, adapter=out)`.
        self_contained: put the code of the layers into the folder: transformers loads it with `trust_remote_code`.
        push_to, private: upload the folder to this Hub repository, which is made where there is none.
        callbacks: objects with `on_step`, `on_evaluate` or `on_stage_end`; one that returns True stops the run, which
            the same call continues. Under torchrun the first process calls them, for all.
        blocks: train these blocks of the first stage alone (`0-3,7`, counted from 0, or `all`: whatever no other
            process trains); the same call without `blocks` makes the student.
        stream: read the teacher block by block: it need not fit into memory.
        memory, disk: what block-wise training and its hidden states may use, in bytes or like `24GB`.

    Raises:
        InputError: an argument that cannot be used; RuntimeError: training diverged, or the upload failed; OSError: the
            disk is full.
    """
    check_callbacks(callbacks)
    request = read_request(
        teacher, data=data, out=out, recipe=recipe, overrides=overrides, blocks=blocks, stream=stream, memory=memory,
        disk=disk, overwrite=overwrite, adapter_only=adapter_only, device=device, trust_remote_code=trust_remote_code,
        tokenizer=tokenizer, revision=revision, token=token, dtype=dtype, device_map=device_map,
        self_contained=self_contained, push_to=push_to, private=private,
    )  # fmt: skip
    group = start()
    _check_group(request, group, callbacks)
    repository = group.share(lambda: _repository(request))
    try:
        student = _convert(request, group, track, progress, callbacks)
    except StopTraining as stop:
        if group.leads:
            note(f"a callback stopped the run {stop}; the same call continues")
        return None
    if repository is not None and group.leads:
        _upload(request, repository)
    return student


def _check_group(request: ConversionRequest, group: Group, callbacks: Sequence[object]) -> None:
    """Refuse what these processes cannot do together. Raises InputError."""
    check_processes(request.recipe, group)
    if group.ranks > 1:
        if request.adapter_only:
            raise InputError("--adapter-only is for one process: leave it out, or convert without torchrun")
        if request.source.model is not None:
            raise InputError(
                "a model in memory is for one process: give its folder, which each process of torchrun reads"
            )
    options = request.options
    reading = {"way of reading (--stream)": str(request.stream), "choice of blocks (--blocks)": str(options.only)}
    reading["callbacks"] = "some" if callbacks else "none"  # the first process calls them, and the others wait for it
    group.agree(run_signature(request.source.path, request.specs, request.recipe, request.final) | reading)


def _convert(
    request: ConversionRequest,
    group: Group,
    track: Sequence[str],
    progress: Progress | None,
    callbacks: Sequence[object],
) -> LinearizedForCausalLM | None:
    """The student of a checked request; see `convert`."""
    final = request.final
    from_disk = request.stream or (group.ranks > 1 and any(map(is_blockwise, request.recipe.stages)))
    if from_disk:
        block_stage(request.recipe)
    lock = output_lock(final, shared=request.only_blocks) if group.leads else nullcontext()
    phases = shown() if group.leads else nullcontext()
    with lock, phases, writing("what the conversion keeps", final.parent):
        if group.share(lambda: _already_written(request)):
            return load(final, device=request.device) if request.needs_whole else None
        tracker = make_tracker(log_folder(request.work, group), track if group.leads else ())
        watching = (tracker, progress or make_progress(), callbacks)
        streamed, parts = train_streamed_blocks(request, group, *watching) if from_disk else (None, [])
        if request.needs_whole:
            return _finish_in_memory(_load(request, group, *watching, parts), request, group)
        if not request.only_blocks:
            assert streamed is not None
            _finish_on_disk(streamed, parts, request, group)
        elif not from_disk:
            _load(request, group, *watching).train_blocks()
    return None


def _repository(request: ConversionRequest) -> str | None:
    """The full name of the repository to upload to, made before any work; None: no upload. Raises InputError."""
    if request.push_to is None:
        return None
    return create_repository(request.push_to, private=request.private, token=request.token)


def _upload(request: ConversionRequest, repository: str) -> None:
    """Upload the student's folder. Raises RuntimeError where the Hub refuses; the folder stays."""
    try:
        with shown():
            address = upload(request.final, repository, token=request.token, message="Upload a student of linearize")
    except InputError as error:
        remedy = f'linearize.load("{request.final}").push_to_hub("{repository}") uploads it'
        raise RuntimeError(f"the student is in {request.final}, but not on the Hub: {error} ({remedy})") from error
    note(f"uploaded to {address}")


def _already_written(request: ConversionRequest) -> bool:
    """Whether an earlier run of the same call wrote the student. Raises InputError where its folder is not free."""
    if not request.only_blocks:
        return is_written(request.final, request.work, request.identity, request.overwrite)
    check_free(request.final, request.overwrite)
    check_formats(request.work)
    return False


def _load(
    request: ConversionRequest,
    group: Group,
    tracker: Tracker,
    progress: Progress,
    callbacks: Sequence[object],
    trained: Sequence[BlockResult] = (),
) -> Conversion:
    """The conversion with its models in memory, checked, and its work folder. `trained`: see `Conversion`."""
    prepared = group.share(
        lambda: prepare(
            request.source, request.recipe, request.specs, device=request.device, overridden=request.overridden,
            stage_on_cpu=group.ranks > 1,
        )
    )  # fmt: skip
    prepared = shard_models(prepared, group, request.device)
    conversion = Conversion(
        prepared, request.specs, request.work, progress, tracker, request.options, trained, callbacks
    )
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
