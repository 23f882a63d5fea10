"""Every command on the pages has the options that it uses; links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from linearize.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]


def commands(page: Path) -> list[list[str]]:
    """The linearize commands in the code of a page, comments dropped, as words."""
    lines = re.findall(r"^(?:    )?(?:torchrun .* -m )?(linearize [a-z].*)$", page.read_text("utf-8"), re.MULTILINE)
    return [shlex.split(line.replace(" ...", ""), comments=True)[1:] for line in lines]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_use_options_that_exist(page: Path) -> None:
    known: Any = get_command(app).commands  # type: ignore[attr-defined]
    for verb, *words in commands(page):
        assert verb in known, f"linearize {verb}"
        options = {option for parameter in known[verb].params for option in parameter.opts}
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
        assert not unknown, f"linearize {verb}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text("utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]
