"""Throughput of whole models in one memory: the batch fits and one row more does not, costs are added up over the text,
wrong outputs have no speed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from benchmarks import generation as module
from benchmarks import throughput as benchmark
from benchmarks.generation import GenerationWorkload, throughput, whole_text
from models import mixer, student_of, tiny

from linearize.errors import InputError
from linearize.evaluation.speed import weight_bytes

SMALL: dict[str, Any] = {"generated": 71, "fills": (9, 33, 71), "span": 3, "chunk": 16}


def written(model: Any, rows_of: int = 7, **changes: Any) -> dict[str, Any]:
    """What a model gives in a budget of its weights and some memory for caches."""
    budget = weight_bytes(model) + rows_of * 40_000
    return throughput(model, GenerationWorkload(budget=budget, **{**SMALL, **changes}))


@pytest.mark.parametrize("kind", ["teacher", "student", "hybrid"])
def test_the_batch_fits_with_the_weights_and_a_larger_one_does_not(kind: str) -> None:
    teacher = tiny()
    plans = {"student": mixer("lolcats"), "hybrid": [mixer("mamba2"), None, None]}
    model = teacher if kind == "teacher" else student_of(teacher, plans[kind])
    budget = weight_bytes(model) + 280_000
    report = written(model)
    assert report["reason"] == "" and report["tokens_per_second"] > 0 and report["tokens_per_second_cpu"] > 0
    assert weight_bytes(model) < report["peak_bytes"] <= budget and not report["capped"]
    config = report["ways"][report["way"]]
    assert len(report["ways"]) == (4 if kind == "teacher" else 1) and config["batch"] == report["batch"] > 1
    assert [step["fill"] for step in report["steps"]] == [9, 36, 66]
    tight = throughput(model, GenerationWorkload(budget=report["peak_bytes"] - 1, **SMALL))
    assert 0 < tight["batch"] <= report["batch"]
    if kind != "teacher":
        assert tight["batch"] < report["batch"]
    assert written(model, most=2)["capped"]


def test_a_memory_of_less_than_one_row_says_so() -> None:
    model = tiny()
    report = throughput(model, GenerationWorkload(budget=weight_bytes(model) + 10, **SMALL))
    assert report["batch"] == 0 and report["reason"] == "one row does not fit" and "tokens_per_second" not in report


def test_costs_are_added_up_between_the_fills_and_level_outside() -> None:
    assert whole_text({10: 2.0, 30: 4.0}, 50) == 10 * 2 + 20 * 3 + 20 * 4
    assert whole_text({20: 3.0}, 70) == 210
    many = {fill: 1.0 + fill for fill in range(1, 101)}
    assert whole_text(many, 100) == pytest.approx(sum(many.values()), rel=0.02)


def test_the_fills_meet_all_parts_of_a_block_and_stay_in_the_text() -> None:
    stops = GenerationWorkload().stops
    assert [stop % 64 for stop in stops[:4]] == [0, 16, 32, 48] and stops[-1] + GenerationWorkload().span + 2 == 4096
    assert GenerationWorkload(generated=20, fills=(5, 500, 900), span=4).stops == [5, 14]


@pytest.mark.parametrize("wrong", [{"span": 0}, {"fills": ()}, {"fills": (0, 4)}, {"generated": 4}, {"budget": 0}])
def test_sizes_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="throughput"):
        GenerationWorkload(**{**SMALL, **wrong})


@pytest.mark.parametrize("rows", ["all", "others"])
def test_wrong_outputs_have_no_speed(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    right, first = model.forward, 1 if rows == "others" else 0

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        if out.logits.shape[0] > 3 or first == 0:
            factor = 0.8 if kwargs.get("past_key_values") is not None else 1.0
            out.logits[first:] = out.logits[first:] * factor
        return out

    monkeypatch.setattr(model, "forward", wrong)
    report = written(model, rows_of=20)
    assert report["batch"] > 3 or rows == "all"
    assert "tokens_per_second" not in report and "wrong output" in report["reason"]


def test_a_pruned_configuration_is_not_measured_further(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = tiny(), module.Filled.step_seconds

    def slow(self: Any, rows: int, span: int) -> dict[str, Any]:
        measured = real(self, rows, span)
        return measured | {"seconds": rows * (50.0 if self.config.attention == "eager" else 1.0)}

    monkeypatch.setattr(module.Filled, "step_seconds", slow)
    report = written(model)
    is_pruned = {name: "not measured further" in config["reason"] for name, config in report["ways"].items()}
    assert {name for name, pruned in is_pruned.items() if pruned} == {name for name in is_pruned if "eager" in name}
    assert report["reason"] == "" and "sdpa" in report["way"]


def test_a_plan_keeps_the_share_that_was_asked_for() -> None:
    assert [entry is None for entry in benchmark.plan_of("mamba2@0.5", 6)] == [False, True] * 3
    assert sum(entry is None for entry in benchmark.plan_of("gated_delta_net@0.25", 12)) == 3
    assert None not in benchmark.plan_of("window-linear", 3)
    for wrong in ("mamba9", "mamba2@1", "mamba2@x", "mamba2@-1"):
        with pytest.raises(InputError):
            benchmark.plan_of(wrong, 4)


def test_the_benchmark_writes_ratios_and_says_them_in_one_line(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    sizes = ["--hidden", "24", "--layers", "4", "--heads", "4", "--kv-heads", "2", "--vocab", "37", "--threads", "1"]
    text = ["--generated", "41", "--fills", "9", "33", "--repeats", "2", "--budget", "600kB"]
    threads = torch.get_num_threads()
    benchmark.main([*sizes, *text, "--student", "lolcats", "gated_delta_net@0.25", "--out", str(out)])
    torch.set_num_threads(threads)
    document, printed = json.loads(out.read_text()), capsys.readouterr().err
    teacher, *students = document["rows"]
    for row in students:
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / teacher["tokens_per_second"])
        assert row["speedup_cpu"] > 0 and f"{row['model']} " in printed
    assert [row["kept_layers"] for row in students] == [[], [2]]
    assert printed.startswith("41 tokens in 600 kB: teacher ") and document["setting"]["writing"]["budget"] == 600_000
