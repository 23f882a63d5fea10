"""Numbers as people write them."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from linearize.errors import InputError
from linearize.numbers import Count, Number, parse_count, parse_number, parse_size, size_text


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("2M", 2_000_000),
        ("2m", 2_000_000),
        ("4.1M", 4_100_000),
        ("250k", 250_000),
        ("1.5B", 1_500_000_000),
        ("1e6", 1_000_000),
        ("2E3", 2_000),
        (" 17 ", 17),
        ("1_024", 1024),
        ("0", 0),
        (3e4, 30_000),
        (7, 7),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_counts(value: object, count: int) -> None:
    assert parse_count(value) == count
    assert type(parse_count(value)) is int


@pytest.mark.parametrize(
    "value", ["", ".", "M", "2MM", "two", "1e", "-3", "0.5", 2.5, True, None, "inf", float("nan"), [4]]
)
def test_what_is_no_count_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(InputError) as caught:
        parse_count(value)
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_keep_fractions() -> None:
    assert parse_number("1e-3") == 0.001
    assert parse_number("-2.5k") == -2500
    assert parse_number(0.05) == 0.05


class _Config(BaseModel):
    tokens: Count
    lr: Number


def test_as_pydantic_fields() -> None:
    config = _Config(tokens="3k", lr="1e-2")  # type: ignore[arg-type]
    assert (config.tokens, config.lr) == (3000, 0.01)
    with pytest.raises(ValidationError, match="no count"):
        _Config(tokens="3.5", lr=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("80GB", 80 * 10**9),
        ("1.5 TB", 1_500 * 10**9),
        ("512MiB", 2**29),
        ("2g", 2 * 10**9),
        (4096, 4096),
        ("1e3k", 10**6),
    ],
)
def test_sizes(value: object, size: int) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize("value", ["", "GB", "-1GB", "0", "3 apples", True, None, 1.5e-9])
def test_no_size(value: object) -> None:
    with pytest.raises(InputError, match="80GB"):
        parse_size(value)


def test_sizes_for_people() -> None:
    sizes = (0, 512, 999, 1000, 16_060_000_000, 206_438_400_000_000, 999_600, 5 * 10**18)
    assert [size_text(size) for size in sizes] == [
        "0 B",
        "512 B",
        "999 B",
        "1 kB",
        "16.1 GB",
        "206 TB",
        "1 MB",
        "5e+03 PB",
    ]
    binary = (0, 999, 1000, 3 * 2**20, 1.5 * 2**30, 2**40)
    assert [size_text(size, binary=True) for size in binary] == [
        "0 B", "999 B", "0.977 KiB", "3 MiB", "1.5 GiB", "1 TiB",
    ]  # fmt: skip
