"""The versions that the tests pass on: one table, the bounds that pip reads, a line if another one is installed."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from linearize import version as subject

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bounds() -> dict[str, Requirement]:
    path = PROJECT / "pyproject.toml"
    listed = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    return {requirement.name: requirement for requirement in map(Requirement, listed)}


@pytest.mark.parametrize("library", sorted(subject.TRIED))
def test_pip_allows_what_was_tried_and_nothing_newer(library: str, bounds: dict[str, Requirement]) -> None:
    oldest, newest = subject.TRIED[library]
    allowed = bounds[library].specifier
    major, minor = map(int, newest.split("."))
    assert allowed.contains(oldest) and allowed.contains(f"{newest}.9")
    assert not allowed.contains(f"{major}.{minor + 1}.0")
    first = [int(part) for part in oldest.split(".")]
    assert not allowed.contains(f"{first[0]}.{first[1] - 1}.9")
    pinned = dict(
        line.split("==") for line in (PROJECT / "constraints.txt").read_text().splitlines() if "==" in line
    )  # fmt: skip
    assert allowed.contains(pinned[library])
    lowest = dict(
        line.split("==") for line in (PROJECT / "constraints-lowest.txt").read_text().splitlines() if "==" in line
    )
    assert lowest[library].startswith(oldest)


@pytest.mark.parametrize(
    "installed,printed",
    [
        ("5.17.0", False), ("5.24.3", False), ("5.23.0", False), ("5.25.0", True), ("5.25.0.dev0", True),
        ("6.0.0rc1", True), ("5.16.1", True), ("4.57.0", True),
    ],
)  # fmt: skip
def test_a_release_that_was_not_tried_is_reported_in_one_line(
    installed: str, printed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        subject, "version", lambda name: {"transformers": installed, "torch": "2.13.0+cpu"}.get(name, "0.20.1")
    )
    with caplog.at_level(logging.WARNING, logger="linearize"):
        subject.report_untried_versions()
    assert len(caplog.records) == int(printed)
    if printed:
        line = caplog.records[0].getMessage()
        assert installed in line and "5.17 to 5.24" in line and "\n" not in line and "torch" not in line
