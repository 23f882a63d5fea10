"""The arguments of `convert`, checked as far as they can be before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.conversion.checks import checked_base
from linearize.conversion.source import DeviceMap, TeacherSource, teacher_source
from linearize.conversion.work_folder import work_folder
from linearize.errors import InputError
from linearize.modeling.export.remote_code import foreign
from linearize.modeling.io.teacher import check_device_map
from linearize.numbers import parse_size
from linearize.recipes.schema import Recipe, load_recipe
from linearize.storage.files import check_apart, expand_home, real_name
from linearize.training.config import BlockwiseConfig, StageConfig
from linearize.training.data.files import EXTENSIONS
from linearize.training.data.loading import local_spec
from linearize.training.data.specs import PSEUDO, input_paths
from linearize.training.stages.lowrank import LowRankConfig


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """How to train by blocks. `memory`: bytes that the process may use, `disk`: bytes that hidden states may use (None:
    what is free). `only`: the blocks to train before stopping, as `0-3,7`, or `all`."""

    memory: int | None = None
    disk: int | None = None
    only: str | None = None

    @property
    def any_set(self) -> bool:
        """Whether any of them is set."""
        return any(value is not None for value in (self.memory, self.disk, self.only))


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
    """What to convert, how, and where to.

    `source`: the teacher. `specs`: the SPECs of the data. `overridden`: the recipe keys that the caller set.
    `stream`: the teacher's weights are read block by block. `final`: the student's folder. `work`: that of the run.
    `self_contained`: the folder gets the code of its layers. `push_to`: a Hub repository to upload it to, made
    `private` or not (None: as the account has it).
    """

    source: TeacherSource
    specs: list[str]
    recipe: Recipe
    overridden: frozenset[str]
    options: BlockOptions
    stream: bool
    overwrite: bool
    adapter_only: bool
    device: str | None
    final: Path
    work: Path
    self_contained: bool = False
    push_to: str | None = None
    private: bool | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def teacher(self) -> str:
        """The teacher's name."""
        return self.source.name

    @property
    def only_blocks(self) -> bool:
        """Whether this call only trains blocks and makes no student."""
        return self.options.only is not None

    @property
    def needs_whole(self) -> bool:
        """Whether the whole model is in memory; a streamed conversion needs that for later stages alone."""
        return not self.only_blocks and (not self.stream or has_later(self.recipe.stages))

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes this conversion from others with the same folder, as JSON; paths are real paths."""
        recipe = self.recipe.model_dump(mode="json")
        for stage, fields in zip(self.recipe.stages, recipe["stages"], strict=True):
            fields |= {place: real_name(fields[place]) for place in stage.places if fields[place] is not None}
        form = {"form": "adapter"} if self.adapter_only else {}
        form |= {"form": "self-contained"} if self.self_contained else {}
        data = [_real_spec(spec) for spec in self.specs]
        return {"teacher": real_name(self.teacher), "data": data, "recipe": recipe, **form, **self.source.pinned}


def read_request(
    teacher: str | os.PathLike[str] | PreTrainedModel,
    *,
    data: Sequence[str | os.PathLike[str]] | str,
    out: str | os.PathLike[str],
    recipe: str | Recipe,
    overrides: Mapping[str, Any] | None,
    blocks: str | None,
    stream: bool,
    memory: int | str | None,
    disk: int | str | None,
    overwrite: bool,
    adapter_only: bool,
    device: str | None,
    trust_remote_code: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: DeviceMap | None = None,
    self_contained: bool = False,
    push_to: str | None = None,
    private: bool | None = None,
) -> ConversionRequest:
    """Check the arguments of `convert` as far as they can be checked by themselves. Raises InputError."""
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = chosen.override(dict(overrides or {}))
    if adapter_only:
        chosen = for_adapter(chosen, stream=stream)
    checked_base(chosen)
    bounds = {name: None if size is None else parse_size(size) for name, size in (("memory", memory), ("disk", disk))}
    options = BlockOptions(only=blocks, **bounds)
    check_options(chosen.stages, options)
    _check_form(adapter_only, self_contained, blocks, push_to, private)
    if self_contained and (reason := foreign([chosen.plan.mixer, *chosen.plan.overrides.values()])):
        raise InputError(f"{reason}: leave out --self-contained")
    final = Path(expand_home(out)).resolve()
    specs = data_specs([data] if isinstance(data, str) else data, chosen)
    check_apart(final, *(path for spec in specs for path in input_paths(spec)))
    source = teacher_source(
        teacher, tokenizer, revision=revision, token=token, dtype=dtype, device_map=device_map,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    check_apart(final, *([source.path] if source.path else []))
    if source.model is not None:
        _check_model(source.model, chosen, stream=stream, adapter_only=adapter_only, device=device)
        device = str(source.model.device)
    unstreamed = {"dtype": dtype, "device_map": device_map}
    if stream and (present := [name for name, value in unstreamed.items() if value is not None]):
        raise InputError(f"{present[0]} is for models that are loaded as a whole: leave it out, or leave out --stream")
    check_device_map(device, device_map)
    return ConversionRequest(
        source=source, specs=specs, recipe=chosen, overridden=frozenset(overrides or ()), options=options,
        stream=stream, overwrite=overwrite, adapter_only=adapter_only, device=device, final=final,
        work=work_folder(final), self_contained=self_contained, push_to=push_to, private=private, token=token,
    )  # fmt: skip


def _check_form(
    adapter_only: bool, self_contained: bool, blocks: str | None, push_to: str | None, private: bool | None
) -> None:
    if adapter_only and self_contained:
        raise InputError("--self-contained writes a whole model with its code, --adapter-only its new part: choose one")
    if private is not None and push_to is None:
        raise InputError("--private is for an upload: give the repository's name with --push-to, or leave it out")
    if blocks is not None and (push_to is not None or self_contained):
        raise InputError("--blocks makes no student to upload: give --push-to and --self-contained with the last call")


def _check_model(
    model: PreTrainedModel, recipe: Recipe, *, stream: bool, adapter_only: bool, device: str | None
) -> None:
    """Refuse what a teacher in memory cannot have. Raises InputError."""
    needs_files = {"stream": stream, "adapter_only": adapter_only, "base_weights": recipe.base_weights != "full"}
    if present := [name for name, is_set in needs_files.items() if is_set]:
        raise InputError(f"{present[0]} reads the teacher's files, and a model in memory was given: give its folder")
    if device is not None and torch.device(device).type != model.device.type:
        raise InputError(f"device {device} given, but the model is on {model.device}: move it there, or leave it out")


def data_specs(data: Sequence[str | os.PathLike[str]], recipe: Recipe) -> list[str]:
    """The SPECs of the text: those that the caller gives, or the sources of the recipe.

    Raises:
        InputError: both name some, or neither does.
    """
    if data and recipe.data.sources:
        raise InputError(
            f"data {', '.join(map(str, data))} given, and data.sources of the recipe names "
            f"{', '.join(source.path for source in recipe.data.sources)}: leave one of them out"
        )
    specs = [str(spec) for spec in data] or [source.path for source in recipe.data.sources]
    if not specs:
        raise InputError(
            f"no data given: name a file ({', '.join(EXTENSIONS)}), a folder, a Hub dataset, or self, by --data or in "
            "data.sources of the recipe"
        )
    return [local_spec(spec) for spec in specs]


def for_adapter(recipe: Recipe, *, stream: bool) -> Recipe:
    """The recipe with LoRA kept apart from the weights, as a student in adapter form needs it.

    Raises:
        InputError: a stage that changes the teacher's weights, several with LoRA, or a way of converting that writes
            whole weights.
    """
    running = [(number, stage) for number, stage in enumerate(recipe.stages) if stage.tokens != 0]
    for number, stage in running:
        if stage.changes_teacher_weights:
            raise InputError(
                f"an adapter holds mixers and LoRA alone, and stages.{number} ({stage.name}) trains the teacher's "
                f"weights: set stages.{number}.train=mixers or its tokens to 0, or leave out --adapter-only"
            )
    low_rank = [number for number, stage in running if isinstance(stage, LowRankConfig)]
    if len(low_rank) > 1:
        raise InputError(f"an adapter holds the LoRA of one stage, this recipe has it in stages {low_rank}: keep one")
    for number in low_rank:
        if recipe.plan.schedule is not None and recipe.stages[number].at == "each":
            raise InputError(
                f"an adapter holds the LoRA of one stage, and stages.{number} runs after each step of plan.schedule: "
                f"set stages.{number}.at=last"
            )
    unsupported = {
        "--stream": stream, "a draft (plan.depth)": recipe.plan.depth is not None,
        f"--base {recipe.base_weights}": recipe.base_weights != "full",
    }  # fmt: skip
    if present := [name for name, is_set in unsupported.items() if is_set]:
        raise InputError(f"{present[0]} writes whole weights: leave it out, or leave out --adapter-only")
    return recipe.override({f"stages.{number}.merge": False for number in low_rank})


def parse_blocks(text: str, count: int | None = None) -> list[int]:
    """The numbers that `0-3,7` names, of `count` blocks; `all` names all of them. Raises InputError."""
    if not isinstance(text, str):
        raise InputError(
            f"blocks {text!r}: give a string of numbers and ranges, counted from 0, like '0-3,7', or 'all'"
        )
    if text.strip() == "all":
        return list(range(count or 0))
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (text.strip() for text in part.partition("-"))
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise InputError(f"blocks {text!r}: write numbers and ranges of blocks, counted from 0, like 0-3,7, or all")
        numbers |= set(range(int(first), int(last or first) + 1))
    if count is not None and max(numbers) >= count:
        raise InputError(f"blocks {text!r}: the model is trained in blocks 0 to {count - 1}; name some of those")
    return sorted(numbers)


def is_blockwise(stage: StageConfig) -> bool:
    """Whether a stage trains block by block."""
    return isinstance(stage, BlockwiseConfig) and stage.block is not None and stage.tokens != 0


def check_options(stages: Sequence[StageConfig], options: BlockOptions) -> None:
    """Refuse block options that these stages cannot use.

    Raises:
        InputError: no block-wise stage, or one after a stage on the whole model.
    """
    running = [stage for stage in stages if stage.tokens != 0]
    first_joint = next((number for number, stage in enumerate(running) if not is_blockwise(stage)), len(running))
    late = [stage.name for stage in running[first_joint:] if is_blockwise(stage)]
    if late:
        raise InputError(
            f"{late[0]} has block set, but {running[first_joint].name} runs before it on the whole model: block-wise "
            "stages come first, set block of this one to null"
        )
    if options.any_set and first_joint == 0:
        raise InputError(
            "memory, disk and blocks are for block-wise stages, and this recipe has none: set stages.0.block=auto "
            "(attention_transfer and hidden_alignment have it)"
        )
    if options.only is not None:
        parse_blocks(options.only)
        if first_joint > 1:
            raise InputError(
                "blocks given, but this recipe has several block-wise stages: set block to null in all but one"
            )


def has_later(stages: Sequence[StageConfig]) -> bool:
    """Whether stages on the whole model follow the block-wise ones."""
    running = [is_blockwise(stage) for stage in stages if stage.tokens != 0]
    return any(running) and not all(running)


def _real_spec(spec: str) -> str:
    """A SPEC with the real path of its file."""
    prefix = PSEUDO if spec.startswith(PSEUDO) else ""
    return prefix + real_name(spec.removeprefix(prefix))
