"""The benchmark of recurrent operations, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import recurrent_op_speed

from linearize.errors import InputError


def test_it_measures_every_operation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrent_op_speed, "LONG", 70)
    monkeypatch.setattr(recurrent_op_speed, "LONGER", 80)
    monkeypatch.setattr(recurrent_op_speed, "matmul_peak", lambda: 50.0)
    out = tmp_path / "speed.json"
    small = ["--tokens", "40", "75", "90", "--heads", "3", "--dims", "5", "--repeats", "1", "--out", str(out)]
    recurrent_op_speed.main(small)
    assert "x sdpa" in capsys.readouterr().out
    written = json.loads(out.read_text())
    rows = {(row["operation"], row["tokens"]): row for row in written["rows"]}
    assert len(rows) == 15 and written["setting"]["peak_gflops"] == 50.0
    assert [rows["ssd", n]["sdpa_heads"] for n in (40, 75, 90)] == [3, 2, 1]
    for (name, _), row in rows.items():
        for part in (row["both"], row["forward"]):
            assert part["speedup"] > 0 and part["sdpa_share_of_peak"] > 0
            share = part["product_gflops"] / part["seconds"]["seconds"] / 50
            assert part["share_of_peak"] == (None if name == "scan" else pytest.approx(share))
        assert name == "scan" or row["both"]["product_gflops"] > 2 * row["forward"]["product_gflops"]


def test_another_operation_is_refused() -> None:
    with pytest.raises(InputError, match="ssd"):
        recurrent_op_speed.main(["--operations", "lstm", "--repeats", "1"])
