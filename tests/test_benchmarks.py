"""The benchmarks run at tiny sizes and give complete results; their numbers are not checked."""

from __future__ import annotations

import json

import pytest
from benchmarks import (
    decode_speed,
    export_parity,
    op_speed,
    prefill_growth,
    static_step,
    transfer_cost,
    verify_cost,
)

from linearize.evaluation.speed.running import interleaved
from linearize.mixers import AttentionShape

TINY = ["--hidden", "24", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--vocab", "37", "--threads", "1"]
OP = ["--tokens", "70", "--windows-at", "70", "--heads", "4", "--kv-heads", "2", "--dim", "10", "--threads", "1"]
CASES = [
    (op_speed, [*OP, "--windows", "16", "5"], "share_of_peak", 4),
    (decode_speed, [*TINY, "--head-dim", "6", "--context", "301", "--mixer", "window-linear"], "speedup", 1),
    (prefill_growth, [*TINY, "--tokens", "65", "131"], "growth", 2),
    (transfer_cost, [*TINY, "--tokens", "67"], "ratio", 1),
    (
        static_step,
        [*TINY, "--context", "21", "--draft-tokens", "2", "--mixer", "gla", "--device", "cpu"],
        "times_as_fast",
        2,
    ),
    (verify_cost, [*TINY, "--context", "21", "--draft-tokens", "3", "5", "--mixer", "mamba2", "gla"], "steps", 2),
]


@pytest.mark.parametrize(("program", "options", "number", "rows"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_a_benchmark_writes_its_number_and_birth_certificate(program, options, number, rows, tmp_path, capsys):
    out = tmp_path / "folder" / "result.json"
    program.main([*options, "--repeats", "2", "--out", str(out)])
    document = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == document
    assert len(document["rows"]) == rows
    for row in document["rows"]:
        value = row[number]
        assert all(x > 0 for x in (value.values() if isinstance(value, dict) else [value]))
    assert document["provenance"]["libraries"]["torch"]
    assert document["provenance"]["seed"] == 0


@pytest.mark.slow
def test_exports_are_compared_where_linearize_is_not(tmp_path, capsys):
    out = tmp_path / "parity.json"
    size = ["--tokens", "11", "--prompt", "4", "--new", "5", "--threads", "1"]
    export_parity.main([*size, "--random", "qwen3", "--out", str(out)])
    document = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == document
    native, carried = document["rows"]
    assert (native["target"], native["class"]) == ("qwen3.5", "Qwen3_5ForCausalLM")
    assert native["mixers"] == ["gated_delta_net", None] * 4
    assert (carried["target"], carried["class"]) == ("hf", "LinearizedForCausalLM")
    for row in document["rows"]:
        assert 0 <= row["prefill"] < 1e-4 and 0 <= row["decode"] < 1e-4 and row["greedy_equal"]
        assert 0 < row["own_decode"] < 1e-4 and row["largest_logit"] > 0.5
    assert document["provenance"]["libraries"]["transformers"] == document["setting"]["transformers"]


def test_the_static_cache_of_the_teacher_holds_the_whole_context(tmp_path):
    out = tmp_path / "result.json"
    decode_speed.main(
        [*TINY, "--head-dim", "10", "--context", "301", "--mixer", "lolcats", "--repeats", "3", "--out", str(out)]
    )
    row = json.loads(out.read_text())["rows"][0]
    head_dim, kv_heads, layers = 10, 2, 2
    held = row["cache_bytes"]["teacher"]
    assert 0 <= held - 2 * layers * kv_heads * head_dim * 4 * (301 + 4) <= 64
    assert row["cache_bytes"]["student"] > 0


def test_timing_takes_turns_after_one_untimed_round():
    calls: list[str] = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == ["a", "b"] * 4
    assert times["a"].lowest <= times["a"].seconds <= times["a"].highest


@pytest.mark.parametrize(("window", "sinks", "tokens"), [(5, 0, 37), (7, 3, 20), (64, 1, 37)])
def test_the_operation_is_counted_by_what_it_needs(window, sinks, tokens):
    config = {"window": window, "window_shape": "terraced", "num_sinks": sinks, "feature_dim": 11}
    shape = AttentionShape(num_heads=6, num_kv_heads=2, head_dim=3, value_dim=5, model_dim=18)
    pairs = sum(j < sinks or n // window - j // window < 2 for n in range(tokens) for j in range(n + 1))
    maps, sums = 2 * tokens * 2 * 3 * 11, 2 * tokens * 2 * 22 * 5
    forward = 6 * (pairs * 2 * (3 + 5) + maps + sums)
    assert op_speed.useful_flops(config, shape, tokens, backward=False) == forward
    assert op_speed.useful_flops(config, shape, tokens, backward=True) == 3 * forward


def test_a_long_text_runs_through_sdpa_once(monkeypatch, tmp_path):
    monkeypatch.setattr(op_speed, "LONG", 60)
    out = tmp_path / "result.json"
    op_speed.main([*OP, "--tokens", "50", "70", "--windows", "16", "--repeats", "3", "--out", str(out)])
    rounds = [(row["pass"], row["rounds"]["sdpa"]) for row in json.loads(out.read_text())["rows"]]
    assert rounds == [("forward and backward", 3), ("forward", 3), ("forward and backward", 1), ("forward", 1)]
