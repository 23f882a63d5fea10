"""Numbers that a section measured, as frozen models: what `report.json` holds of it, typed; and the cache of results.

`to_json` leaves out what was never set, so that a report read back and written again is the same JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from linearize.errors import InputError
from linearize.metrics.intervals import Mean, Proportion, interval, paired_difference, plus_minus, share_text
from linearize.storage.atomic import atomic_write_text
from linearize.storage.files import read_json

Role = Literal["teacher", "student"]


class NumbersModel(BaseModel):
    """The base of all numbers: frozen, and it refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, without the fields that were never set."""
        return self.model_dump(exclude_unset=True)


class MeanNumbers(NumbersModel):
    """A mean and its standard error (None: unknown), as `intervals.Mean.to_dict` gives them."""

    value: float
    error: float | None

    @classmethod
    def of(cls, mean: Mean) -> MeanNumbers:
        """Take over a measured mean."""
        return cls(value=mean.value, error=mean.error)

    @property
    def text(self) -> str:
        """`0.123 ± 0.004`."""
        return plus_minus(self.value, self.error)

    @property
    def percent(self) -> str:
        """`66.1% ± 5.0%`."""
        error = "" if self.error is None else f" ± {100 * self.error:.1f}%"
        return f"{100 * self.value:.1f}%{error}"

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval; infinite where the error is unknown, since nothing is certain then."""
        return interval(self.value, math.inf if self.error is None else self.error)

    @property
    def clearly_positive(self) -> bool:
        """Whether the interval is above 0."""
        return self.interval[0] > 0


class DifferenceNumbers(NumbersModel):
    """A mean of paired differences over `n` items with its 95% interval, as `intervals.Difference.to_dict` gives it."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> DifferenceNumbers:
        """First minus second, item by item."""
        return cls.model_validate(paired_difference(first, second).to_dict())

    @property
    def text(self) -> str:
        """In per cent, with the interval."""
        return share_text(self.value, self.low, self.high)

    @property
    def points(self) -> str:
        """In points, with the interval."""
        return f"{100 * self.value:.1f} points ({100 * self.low:.1f} to {100 * self.high:.1f})"


class ShareNumbers(NumbersModel):
    """A share of `n` items with its 95% interval, as `intervals.Proportion.to_dict` gives it."""

    value: float
    low: float
    high: float
    successes: int
    n: int

    @classmethod
    def of(cls, hits: Iterable[bool | int]) -> ShareNumbers:
        """Count the hits."""
        return cls.model_validate(Proportion.of(hits).to_dict())

    @property
    def text(self) -> str:
        """In per cent, with the interval; `-` for no items."""
        return share_text(self.value, self.low, self.high) if self.n else "-"

    @property
    def percent(self) -> str:
        """In per cent, with one digit."""
        return f"{100 * self.value:.1f}%"

    @property
    def count(self) -> str:
        """`3 of 7`."""
        return f"{self.successes} of {self.n}"


N = TypeVar("N", bound=NumbersModel)


@dataclass(frozen=True)
class ResultCache:
    """A folder of results by key; without a folder nothing is kept."""

    folder: Path | None = None

    def result(self, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What was measured under this key before, else what `measure()` returns, which is kept; as JSON gives it back.

        The key must hold everything that the result depends on, the model's fingerprint and the seed included.
        """
        if self.folder is None:
            return json.loads(json.dumps(measure()))
        text = json.dumps(key, sort_keys=True)
        path = self.folder / f"{key.get('section', 'result')}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
        if path.is_file():
            try:
                kept = read_json(path)
            except InputError:
                kept = {}
            if isinstance(kept, dict) and kept.get("key") == json.loads(text):
                return kept["result"]
        result = measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps({"key": key, "result": result}))
        return json.loads(json.dumps(result))

    def numbers(self, kind: type[N], key: Mapping[str, Any], measure: Callable[[], N]) -> N:
        """As `result`, for numbers of one model class."""
        return kind.model_validate(self.result(key, lambda: measure().to_json()))

    def path(self, name: str) -> Path | None:
        """The path of a file that a section keeps by itself (its folder is made); None where nothing is kept."""
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name
