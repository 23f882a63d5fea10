"""The budget of block-wise training: bytes on disk, bytes in memory, and the block that fits both."""

from __future__ import annotations

from dataclasses import replace

import pytest

from linearize.errors import InputError
from linearize.training.blockwise import BlockSizes, block_peak_bytes, boundary_bytes, check_block, choose_block
from linearize.training.blockwise.budget import fitting_blocks, ranges

TB = 10**12
SIZES = BlockSizes(
    layers=10, model_dim=7, tokens=1000, itemsize=2, layer_bytes=100, trained=3, kept_bytes=40, passing_bytes=11,
    outside_bytes=350, process_bytes=1000,
)  # fmt: skip


def test_boundaries_of_the_published_405b() -> None:
    every_layer = boundary_bytes(50_000_000, 16_384, 126, 1)
    assert every_layer == 2 * 50_000_000 * 16_384 * 126 > 200 * TB
    assert boundary_bytes(50_000_000, 16_384, 126, 9) == every_layer // 9  # 14 blocks
    assert boundary_bytes(5, 7, 10, 3, itemsize=4) == 4 * 5 * 7 * 4  # the last block is shorter, not missing
    assert boundary_bytes(5, 7, 10, 10) == 2 * 5 * 7


def test_memory_grows_with_the_block_and_not_with_the_depth() -> None:
    per_layer = 100 + 3 * (4 + 16) + 40
    assert block_peak_bytes(SIZES, 3) == 1000 + 3 * per_layer + 11
    assert block_peak_bytes(SIZES, 1) == 1000 + 350  # the embedding alone is more than one layer in training
    assert block_peak_bytes(replace(SIZES, layers=40), 3) == block_peak_bytes(SIZES, 3)
    assert block_peak_bytes(SIZES, 40) == block_peak_bytes(SIZES, 10)


def test_the_fewest_blocks_that_fit_in_the_least_memory() -> None:
    assert choose_block(SIZES) == 10
    assert choose_block(SIZES, memory_bytes=block_peak_bytes(SIZES, 9)) == 5  # 9 layers make two blocks, as 5 do
    assert choose_block(SIZES, memory_bytes=block_peak_bytes(SIZES, 4)) == 4
    assert choose_block(SIZES, memory_bytes=block_peak_bytes(SIZES, 3) - 1) == 2
    both = {"memory_bytes": block_peak_bytes(SIZES, 6), "disk_bytes": 3 * 2 * 7 * 1000}
    assert fitting_blocks(SIZES, **both) == [4, 5, 6]
    assert choose_block(SIZES, **both) == 5


def test_a_block_that_does_not_fit_names_those_that_do() -> None:
    check_block(SIZES, 4, memory_bytes=block_peak_bytes(SIZES, 6), disk_bytes=3 * 2 * 7 * 1000)
    with pytest.raises(InputError, match=r"block 1 needs 140 kB of disk .*\(42 kB given\): 4 to 10 would fit; give 10"):
        check_block(SIZES, 1, disk_bytes=42_000)
    with pytest.raises(InputError, match=r"needs 2.81 kB of memory \(2.21 kB given\): 1 to 6 would fit; give 5"):
        check_block(SIZES, 9, memory_bytes=block_peak_bytes(SIZES, 6))
    for block in (0, 11):
        with pytest.raises(InputError, match="give 1 to 10"):
            check_block(SIZES, block)


def test_where_nothing_fits_the_message_says_why() -> None:
    with pytest.raises(InputError, match=r"even block 1 needs 1.35 kB of memory, 1 kB given"):
        choose_block(SIZES, memory_bytes=1000)
    with pytest.raises(InputError, match=r"all 10 layers needs 14 kB of disk for hidden states, 10 B given"):
        check_block(SIZES, 2, disk_bytes=10)
    with pytest.raises(InputError, match=r"takes at most 2 layers, which need 70 kB of disk; .* at least 5"):
        choose_block(SIZES, memory_bytes=block_peak_bytes(SIZES, 2), disk_bytes=2 * 14_000)


def test_ranges() -> None:
    assert ranges([1, 2, 3, 5, 7, 8]) == "1 to 3, 5, 7 to 8"
