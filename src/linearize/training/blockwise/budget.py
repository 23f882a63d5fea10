"""What a block of k layers costs, before anything is read: bytes of memory while it trains, bytes of disk for the
teacher's hidden states at the blocks' inputs; and the k that fits both.

All sizes are bytes, tokens are tokens. A block's number of layers is `block`, k in the paper; the last block may be
shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

from linearize.errors import InputError
from linearize.numbers import size_text

ADAM_BYTES = 16  # gradient, two moments, the best weights so far: four numbers of fp32 beside each parameter


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """What the memory and the disk of a block depend on.

    `layers`: of the whole model. `model_dim`: width of the hidden states. `tokens`: unique tokens whose hidden states
    are written. `itemsize`: bytes of one number of theirs. `layer_bytes`: weights of the largest layer as it computes
    (teacher and student share them), new parameters left out. `trained`: parameters that train in the largest layer.
    `kept_bytes`: what one layer keeps for its backward pass over one micro-batch. `passing_bytes`: the most that exists
    besides, whatever k is (one layer's intermediate results, the micro-batch itself). `outside_bytes`: embedding, or
    final norm and head with the logits of a slice, whichever is more: no block trains while they are in memory.
    `process_bytes`: interpreter and libraries.
    """

    layers: int
    model_dim: int
    tokens: int
    itemsize: int
    layer_bytes: int
    trained: int
    kept_bytes: int
    passing_bytes: int
    outside_bytes: int
    process_bytes: int


def boundary_bytes(tokens: int, model_dim: int, layers: int, block: int, itemsize: int = 2) -> int:
    """Bytes of the hidden states at the inputs of all blocks: itemsize x tokens x model_dim x ceil(layers / block)."""
    return itemsize * tokens * model_dim * -(-layers // block)


def block_peak_bytes(sizes: BlockSizes, block: int) -> int:
    """The most bytes that a process holds which trains blocks of `block` layers one after the other.

    Weights, new parameters in fp32 with gradient, AdamW's moments and the best so far, and what autograd keeps grow
    with the block; the rest does not.
    """
    per_layer = sizes.layer_bytes + sizes.trained * (4 + ADAM_BYTES) + sizes.kept_bytes
    training = min(block, sizes.layers) * per_layer + sizes.passing_bytes
    return sizes.process_bytes + max(training, sizes.outside_bytes)


def choose_block(sizes: BlockSizes, *, memory_bytes: int | None = None, disk_bytes: int | None = None) -> int:
    """The cheapest k in this much memory and disk (None: without bound).

    What is minimised is the number of blocks, so the bytes written and read again; of all k that give as few blocks the
    smallest one is taken, which needs the least memory.

    Raises:
        InputError: no k fits; says what the nearest ones need.
    """
    fitting = fitting_blocks(sizes, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
    if not fitting:
        raise _nothing_fits(sizes, memory_bytes, disk_bytes)
    return min(fitting, key=lambda block: (-(-sizes.layers // block), block))


def check_block(
    sizes: BlockSizes, block: int, *, memory_bytes: int | None = None, disk_bytes: int | None = None
) -> None:
    """Refuse a k that does not fit into this much memory and disk.

    Raises:
        InputError: says what it needs, and which k would fit.
    """
    if not 1 <= block <= sizes.layers:
        raise InputError(f"block {block}: the model has {sizes.layers} layers; give 1 to {sizes.layers}, or auto")
    needs = [
        f"{size_text(need)} of {what} ({size_text(bound)} given)"
        for what, need, bound in (
            ("memory", block_peak_bytes(sizes, block), memory_bytes),
            ("disk for hidden states", _disk(sizes, block), disk_bytes),
        )
        if bound is not None and need > bound
    ]
    if not needs:
        return
    fitting = fitting_blocks(sizes, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
    if not fitting:
        raise _nothing_fits(sizes, memory_bytes, disk_bytes)
    best = choose_block(sizes, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
    raise InputError(f"block {block} needs {' and '.join(needs)}: {ranges(fitting)} would fit; give {best}, or auto")


def fitting_blocks(sizes: BlockSizes, *, memory_bytes: int | None = None, disk_bytes: int | None = None) -> list[int]:
    """Every k from 1 to the number of layers that fits both bounds."""
    return [
        block
        for block in range(1, sizes.layers + 1)
        if (memory_bytes is None or block_peak_bytes(sizes, block) <= memory_bytes)
        and (disk_bytes is None or _disk(sizes, block) <= disk_bytes)
    ]


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as people write them: `1 to 4, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _disk(sizes: BlockSizes, block: int) -> int:
    return boundary_bytes(sizes.tokens, sizes.model_dim, sizes.layers, block, sizes.itemsize)


def _nothing_fits(sizes: BlockSizes, memory_bytes: int | None, disk_bytes: int | None) -> InputError:
    """Which bound no k satisfies, or why those that satisfy one break the other."""
    least_memory, least_disk = block_peak_bytes(sizes, 1), _disk(sizes, sizes.layers)
    if memory_bytes is not None and least_memory > memory_bytes:
        need, way = f"even block 1 needs {size_text(least_memory)} of memory", "shorter rows, a smaller micro_batch"
        return InputError(f"{need}, {size_text(memory_bytes)} given: give more, {way} or a smaller feature map")
    assert disk_bytes is not None
    if least_disk > disk_bytes:
        need = f"even one block of all {sizes.layers} layers needs {size_text(least_disk)} of disk for hidden states"
        return InputError(f"{need}, {size_text(disk_bytes)} given: give more disk or fewer tokens")
    largest = max(fitting_blocks(sizes, memory_bytes=memory_bytes))
    smallest = min(fitting_blocks(sizes, disk_bytes=disk_bytes))
    return InputError(
        f"no block fits: {size_text(memory_bytes or 0)} of memory takes at most {largest} layers, which need "
        f"{size_text(_disk(sizes, largest))} of disk; {size_text(disk_bytes)} of disk takes at least {smallest}, which "
        f"need {size_text(block_peak_bytes(sizes, smallest))} of memory: give more of one of them"
    )
