"""Results of an interrupted evaluation, one small JSON file each, so that the same command continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from linearize.errors import InputError
from linearize.evaluation.numbers import NumbersModel
from linearize.storage.atomic import atomic_write_text
from linearize.storage.files import read_json

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
