"""docs/api.md is what the docstrings say, has every public name, and its examples run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripts.api_examples import EXAMPLES, PRELUDE
from scripts.api_page import PAGE, page
from teacher_folder import write_text

import linearize
from linearize.mixers import MIXERS
from linearize.modeling.export import EXPORTS
from linearize.training.stages import STAGES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_the_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == page(), "run python -m scripts.api_page"


def test_every_public_name_is_on_it() -> None:
    assert set(EXAMPLES) == set(linearize.__all__) - {"__version__"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run, one after the other."""
    path = tmp_path_factory.mktemp("examples")
    write_text(path / "stories.txt", 60)
    others = (f"Tom had {n} red cats and a big box. They ran to the park." for n in range(36))
    (path / "other_stories.txt").write_text("\n\n".join(others))
    return path


@pytest.mark.slow
def test_the_examples_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    tables: list[Any] = [MIXERS, STAGES, EXPORTS]
    before = [set(table) for table in tables]
    try:
        for name, code in EXAMPLES.items():
            exec(compile(PRELUDE + code, f"the example of {name}", "exec", dont_inherit=True), {})
    finally:
        for table, names in zip(tables, before, strict=True):
            for name in set(table) - names:
                table.unregister(name)
    assert (folder / "student" / "report.json").is_file() and (folder / "exported" / "modeling_linearized.py").is_file()
