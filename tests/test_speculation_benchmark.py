"""The benchmark of speculation: prompts by seed, several seeds in one table, `auto` with and without measurements."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.speculation import NEW, PLAIN, _seeds, measure, over_seeds, read_prompts, table
from models import text
from speculation_cases import near, target

from linearize.errors import InputError


def test_prompts_by_seed(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("\n\n".join(f"story {i}" for i in range(30)))
    first, drawn, other = (read_prompts([path], 5, seed) for seed in (0, 1, 2))
    assert first == [f"story {i}" for i in range(5)]
    assert drawn != first and drawn != other and len(set(drawn)) == 5
    assert drawn == read_prompts([path], 5, 1)
    assert _seeds("0, 3,12") == [0, 3, 12]
    with pytest.raises(InputError, match="--seed 1,x"):
        _seeds("1,x")


def test_all_ways_in_one_table() -> None:
    model = target("lolcats")
    prompts = [text(1, 9)[0].tolist(), text(1, 7)[0].tolist()]
    settings = {"sizes": [2], "new_tokens": 11, "repeats": 1}
    by_seed = [measure(model, {"near": near(model), "lookup": None}, prompts, **settings) for _ in range(3)]
    rows = over_seeds(by_seed)
    assert [(row["draft"], row["draft_tokens"]) for row in rows] == [
        (PLAIN, 0), ("near", 2), ("near", "auto"), ("near", NEW), ("lookup", 2), ("lookup", "auto"), ("lookup", NEW),
    ]  # fmt: skip
    for place, row in enumerate(rows):
        speeds = sorted(one[place]["speedup"] for one in by_seed)
        assert row["speedup"] == speeds[1] and row["speedup_range"] == [speeds[0], speeds[2]]
        assert row["tokens"] == 3 * 22
    chosen = [one[2]["chosen"] for one in by_seed]
    assert rows[2]["chosen"] == {k: sum(c.get(k, 0) for c in chosen) for k in rows[2]["chosen"]}
    printed = table(rows)
    assert len(printed.splitlines()) == 8 and f"{rows[1]['speedup']:.2f}" in printed
