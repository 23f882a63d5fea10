"""A student in memory on the Hub: weights, config, tokenizer, and the card, recipe and report of its folder."""

from __future__ import annotations

import fnmatch
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.errors import InputError
from linearize.modeling.io.hub import NOT_UPLOADED, create_repository, upload
from linearize.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linearize.modeling.student import LinearizedForCausalLM

_SAVED = ("*.safetensors", "*.safetensors.index.json", "adapter/*", "linearize_adapter.json", *NOT_UPLOADED)
_CARD = """---
library_name: linearize
pipeline_tag: text-generation
tags: [linearize, linear-attention]
---

# {title}

A student of `{teacher}` made with linearize {version}: {mixers}. No report of its conversion came with it.

```python
import linearize

model = linearize.load("{name}")
```
"""


def push_student(
    student: LinearizedForCausalLM,
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a student of linearize",
) -> str:
    """Upload a student as one commit; returns the commit's address.

    What is in the folder that it was loaded from besides weights and log (tokenizer, card, recipe, report, code) comes
    with it. `tokenizer`: None: that of the folder.

    Raises:
        InputError: no tokenizer, no network, or the Hub refuses; nothing is uploaded then.
    """
    origin = Path(student.name_or_path) if student.name_or_path else None
    if origin is not None and not (origin / "config.json").is_file():
        origin = None
    if tokenizer is None and (origin is None or not any(origin.glob("tokenizer*"))):
        raise InputError("the student was not loaded from a folder with a tokenizer: give tokenizer=")
    name = create_repository(name, private=private, token=token)
    with tempfile.TemporaryDirectory(prefix="linearize-upload-") as temporary:
        folder = Path(temporary)
        student.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if origin is not None:
            _copy_rest(origin, folder)
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(_card(student, name), "utf-8")
        return upload(folder, name, token=token, message=message, revision=revision)


def _copy_rest(origin: Path, folder: Path) -> None:
    """Copy what a student's folder holds besides what saving the student writes."""
    for path in origin.rglob("*"):
        inside = path.relative_to(origin).as_posix()
        target = folder / inside
        if path.is_file() and not target.exists() and not any(fnmatch.fnmatch(inside, each) for each in _SAVED):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _card(student: LinearizedForCausalLM, name: str) -> str:
    """A model card from the config alone."""
    names = [None if entry is None else str(entry["name"]) for entry in student.config.plan]
    parts = [f"`{each}` in {names.count(each)} of {len(names)} layers" for each in dict.fromkeys(names) if each]
    return _CARD.format(
        title=name.rpartition("/")[2], teacher=student.config.teacher_name or student.config.teacher.get("model_type"),
        version=__version__, mixers=", ".join(parts), name=name,
    )  # fmt: skip
