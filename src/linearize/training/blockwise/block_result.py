"""The result of training a block: its mixers' tensors before and after, and the stage's result.

It is one safetensors file a block, written whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearize.errors import InputError
from linearize.modeling.io.integrity import crc32
from linearize.training.loop import History, StageResult

FORMAT = 2
LOG = logging.getLogger("linearize")


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """A trained block.

    `start`, `final`: its mixers' tensors by their names in the whole student. `stage`: None where nothing trains.
    """

    layers: range
    start: dict[str, Tensor]
    final: dict[str, Tensor]
    stage: StageResult | None


def result_path(folder: Path, layers: range) -> Path:
    """Return the file of the block with these layers."""
    return folder / f"layers-{layers[0]:03d}-{layers[-1]:03d}.safetensors"


def save_result(folder: Path, block: BlockResult, identity: Mapping[str, object]) -> None:
    """Write a block's result. Raises OSError where the disk is full."""
    tensors = {f"start/{name}": value for name, value in block.start.items()}
    tensors |= {f"final/{name}": value for name, value in block.final.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {
        "identity": _canonical(identity),
        "result": json.dumps(None if block.stage is None else asdict(block.stage)),
        "crc32": crc32(tensors),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(folder, block.layers)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        save_file(tensors, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {partial}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_result(folder: Path, layers: range, identity: Mapping[str, object]) -> BlockResult | None:
    """Return the result of these layers, None where there is none; remove a damaged one, with a warning.

    Raises:
        InputError: a result of another run.
    """
    path = result_path(folder, layers)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            metadata = file.metadata() or {}
        result, saved = json.loads(metadata["result"]), metadata["identity"]
        if metadata["crc32"] != crc32(tensors):
            raise ValueError("its bytes do not fit their checksum")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        LOG.warning("%s is damaged (%s): its block is trained again", path, " ".join(str(error).split()))
        path.unlink(missing_ok=True)
        return None
    if saved != _canonical(identity):
        key = _differing(json.loads(saved), json.loads(_canonical(identity)))
        raise InputError(
            f"{path} belongs to another run or version ({key}): run with the same settings to continue it, or delete it"
        )
    trained = {which: _under(tensors, f"{which}/") for which in ("start", "final")}
    stage = None if result is None else stage_result(result)
    return BlockResult(layers=layers, start=trained["start"], final=trained["final"], stage=stage)


def merge_results(blocks: Sequence[BlockResult], name: str) -> StageResult:
    """Return one result of all blocks.

    Losses are sums over the blocks, as the joint stage has them; a block that stopped early counts as it ended. Tokens
    are those of the longest block; seconds and parameters add up.
    """
    results = [block.stage for block in blocks if block.stage is not None]
    assert results, "some block must train"
    longest = max(results, key=lambda result: result.steps)
    return StageResult(
        name=name,
        steps=longest.steps,
        tokens=longest.tokens,
        seconds=sum(result.seconds for result in results),
        trainable_parameters=sum(result.trainable_parameters for result in results),
        losses=_summed([result.losses for result in results]),
        heldout=_summed([result.heldout for result in results]),
        best_step=max(result.best_step for result in results),
        stopped_early=any(result.stopped_early for result in results),
        metrics={
            f"layers {block.layers[0]}-{block.layers[-1]}": block.stage.heldout
            for block in blocks
            if block.stage is not None and len(results) > 1
        },
    )


def _summed(histories: Sequence[History]) -> History:
    """Return the sum at every step of the longest history; a shorter one continues with its last value."""
    steps = [step for step, _ in max(histories, key=len, default=())]
    known = [dict(history) for history in histories if history]
    last = [0.0] * len(known)
    summed = []
    for step in steps:
        last = [history.get(step, before) for history, before in zip(known, last, strict=True)]
        summed.append((step, sum(last)))
    return tuple(summed)


def stage_result(data: Mapping[str, Any]) -> StageResult:
    """The result of a stage from its fields, which went through JSON."""
    histories = {key: tuple((int(step), loss) for step, loss in data[key]) for key in ("losses", "heldout")}
    return StageResult(**{**data, **histories})


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _canonical(identity: Mapping[str, object]) -> str:
    return json.dumps({"format": FORMAT, **identity}, sort_keys=True)


def _differing(old: Any, new: Any, where: str = "") -> str:
    """Return the first key that differs, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _differing(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    return f"{where} was {str(old)[:80]}, is {str(new)[:80]}"
