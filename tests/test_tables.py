"""Tables for people: aligned, nothing cut or coloured where stdout is not a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from linearize.tables import columns_of, is_numeric, print_pairs, print_table, stdout_console

ROWS = [{"layer": "0", "mixer": "-"}, {"layer": "11", "mixer": "[red]lolcats[/] :cat:", "kl": "0.10 ± 0.02"}]


def test_plain_output_is_aligned_and_holds_every_character(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_table(stdout_console(), ROWS, title="A [title]", note="n" * 300)
    assert capsys.readouterr().out.splitlines() == [
        "A [title]",
        "layer  mixer                           kl",
        "    0  -",
        "   11  [red]lolcats[/] :cat:  0.10 ± 0.02",
        "n" * 300,
    ]


def test_plain_output_cuts_and_wraps_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    row = {f"column {i}": f"{i}" * 400 for i in range(9)}
    print_table(stdout_console(), [row])
    head, line = capsys.readouterr().out.splitlines()
    assert line.split() == list(row.values()) and head.split("column")[1:]


def test_pairs_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_pairs(stdout_console(), {"loss": "1.25", "tokens": "2,000"})
    assert capsys.readouterr().out == "loss    1.25\ntokens  2,000\n"


def test_a_terminal_gets_rules_and_its_width() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=40, markup=False, color_system=None)
    print_table(console, [{"name": "lolcats", "description": "words " * 20}])
    lines = file.getvalue().splitlines()
    assert any("─" in line for line in lines) and max(map(len, lines)) <= 40 and len(lines) > 4


def test_numbers_are_not_broken_on_a_narrow_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=20, markup=False, color_system=None)
    print_table(console, [{"name": "lolcats", **{f"number {i}": f"{i}.5 ± 0.25" for i in range(4)}}])
    (line,) = [line for line in file.getvalue().splitlines() if "lolcats" in line]
    assert all(f"{i}.5 ± 0.25" in line for i in range(4)) and console.width == 20


@pytest.mark.parametrize(
    ("cell", "numeric"),
    [
        ("0.123 ± 0.004", True), ("52.0% (48.1 to 55.9)", True), ("3 KiB", True), ("-0.3", True), ("1.2x", True),
        ("16-31", True),
        ("4 lolcats, 2 softmax", False), ("llama-7b", False), ("12 documents", False), ("sdpa, static", False),
    ],
)  # fmt: skip
def test_which_cells_are_numbers(cell: str, numeric: bool) -> None:
    assert is_numeric([cell, "-", ""]) is numeric


def test_a_column_of_nothing_is_no_number() -> None:
    assert not is_numeric(["", "-"])
    assert columns_of(ROWS) == ["layer", "mixer", "kl"]
