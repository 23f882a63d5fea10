"""Numbers as people write them in recipes and on the command line: `2e6`, `2M`, `250k`, `1_000`."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator

from linearize.errors import InputError

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_PATTERN = re.compile(r"\s*([+-]?(?:\d[\d_]*)?\.?\d*(?:e[+-]?\d+)?)\s*([kmbg]?)\s*", re.IGNORECASE)

_SIZE = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([kmgtp]?)(i?)b?\s*", re.IGNORECASE)


def parse_number(value: object) -> float | int:
    """Parse a number from int, float or text (`"1e-3"`, `"2M"`, `"250k"`); whole numbers come back as int.

    Raises:
        InputError: when the value is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InputError(f"{value!r} is no number: write it like 0.05, 2000000, 2e6, 2M or 250k")
    number = _from_text(value) if isinstance(value, str) else value
    if isinstance(number, int):
        return number
    if not math.isfinite(number):
        raise InputError(f"{value!r} is not finite: write a number like 0.05, 2e6, 2M or 250k")
    return int(number) if number.is_integer() else number


def parse_count(value: object) -> int:
    """A whole number of things: `parse_count("2M") == 2000000`; also `"1e6"`, `"250k"`, `1e6`, `7`.

    Raises:
        InputError: when the value is no number, not whole, or negative.
    """
    number = parse_number(value)
    if not isinstance(number, int) or number < 0:
        raise InputError(f"{value!r} is no count: a whole number >= 0 is needed, like 2000000, 2e6, 2M or 250k")
    return number


def parse_size(value: object) -> int:
    """Bytes as people write them: `parse_size("1.5TB") == 1_500_000_000_000`; also `80GB`, `512MiB`, `2G`, `4096`.

    Decimal units (k, M, G, T, P) are powers of 1000, binary ones (KiB, MiB, ...) of 1024.

    Raises:
        InputError: when the value is no number of bytes above 0.
    """
    match = _SIZE.fullmatch(str(value))
    if match is None or isinstance(value, bool):
        raise InputError(f"{value!r} is no size: write it like 80GB, 512MiB, 1.5TB or 4096 (bytes)")
    factor = (1024 if match[3] else 1000) ** " kmgtp".index(match[2].lower() or " ")
    size = round(float(match[1].replace("_", "")) * factor)
    if size < 1:
        raise InputError(f"{value!r} is no size above 0: write it like 80GB, 512MiB, 1.5TB or 4096 (bytes)")
    return size


def size_text(count: float, *, binary: bool = False) -> str:
    """Bytes for people, three figures: `205 TB`, `16.1 GB`, `512 B`; with `binary` in units of 1024: `3 KiB`."""
    base, units = (1024, ("B", "KiB", "MiB", "GiB", "TiB")) if binary else (1000, ("B", "kB", "MB", "GB", "TB"))
    for unit in units:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= base
    return f"{count:,.3g} {'PiB' if binary else 'PB'}"


def _from_text(text: str) -> float | int:
    match = _PATTERN.fullmatch(text)
    try:
        if match is None:
            raise ValueError(text)
        digits, factor = match[1].replace("_", ""), _SUFFIXES[match[2].lower()]
        if digits.lstrip("+-").isdigit():
            return int(digits) * factor
        # rounding undoes what binary fractions do to a decimal: 4.1M is 4100000, not 4099999.9999999995
        return round(float(digits) * factor, 6) if factor > 1 else float(digits)
    except ValueError as error:
        raise InputError(f"{text!r} is no number: write it like 0.05, 2000000, 2e6, 2M or 250k") from error


Count = Annotated[int, BeforeValidator(parse_count, json_schema_input_type=int | float | str)]
"""A pydantic field that holds an int >= 0 and may be written `2e6` or `2M`."""

Number = Annotated[float, BeforeValidator(parse_number, json_schema_input_type=float | str)]
"""A pydantic field that holds a float and may be written `1e-3` (which YAML reads as text) or `2M`."""
