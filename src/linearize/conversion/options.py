"""What a person may say about a block-wise conversion, and what it means for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linearize.errors import InputError
from linearize.training.config import BlockwiseConfig, StageConfig


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """`memory`: bytes that the process may take, `disk`: bytes that hidden states may take (None: what is free).
    `only`: the blocks to train before stopping, as `0-3,7`, or `all`."""

    memory: int | None = None
    disk: int | None = None
    only: str | None = None

    @property
    def given(self) -> bool:
        """Whether any of them was."""
        return any(value is not None for value in (self.memory, self.disk, self.only))


def parse_blocks(text: str, count: int | None = None) -> list[int]:
    """`0-3,7` as numbers, of `count` blocks; `all` is all of them. Raises InputError."""
    if not isinstance(text, str):
        raise InputError(f"blocks {text!r}: give text, numbers and ranges of blocks, from 0, as '0-3,7', or 'all'")
    if text.strip() == "all":
        return list(range(count or 0))
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise InputError(f"blocks {text!r}: write numbers and ranges of blocks, from 0, as 0-3,7, or all")
        numbers |= set(range(int(first), int(last or first) + 1))
    if count is not None and max(numbers) >= count:
        raise InputError(f"blocks {text!r}: the model is trained in blocks 0 to {count - 1}; name those")
    return sorted(numbers)


def is_blockwise(stage: StageConfig) -> bool:
    """Whether a stage trains block by block."""
    return isinstance(stage, BlockwiseConfig) and stage.block is not None and stage.tokens != 0


def check_options(stages: Sequence[StageConfig], options: BlockOptions) -> None:
    """Refuse options that mean nothing for these stages.

    Raises:
        InputError: no block-wise stage, or one after a stage that changes what it reads from the teacher.
    """
    running = [stage for stage in stages if stage.tokens != 0]
    first_joint = next((number for number, stage in enumerate(running) if not is_blockwise(stage)), len(running))
    late = [stage.name for stage in running[first_joint:] if is_blockwise(stage)]
    if late:
        raise InputError(
            f"{late[0]} has block set, but {running[first_joint].name} runs before it on the whole model: block-wise "
            "stages come first, set block of this one to null"
        )
    if options.given and first_joint == 0:
        raise InputError(
            "memory, disk and blocks speak of block-wise stages, and this recipe has none: set stages.0.block=auto "
            "(attention_transfer and hidden_alignment have it)"
        )
    if options.only is not None:
        parse_blocks(options.only)
        if first_joint > 1:
            raise InputError(
                "blocks were given, but this recipe has several block-wise stages: set one of them at a time"
            )


def has_later(stages: Sequence[StageConfig]) -> bool:
    """Whether stages on the whole model follow the block-wise ones."""
    running = [is_blockwise(stage) for stage in stages if stage.tokens != 0]
    return any(running) and not all(running)
