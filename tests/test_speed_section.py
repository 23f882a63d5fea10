"""The section `speed`: what it measures is complete, right before it is fast, and within the memory it speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from models import mixer, student_of, text, tiny
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.evaluation.context import EvalContext, EvalModel
from linearize.evaluation.numbers import ResultCache
from linearize.evaluation.sections.speed import Speed, points
from linearize.evaluation.sections.speed import measure as section
from linearize.evaluation.sections.speed.largest_batch import (
    PROBES,
    RepeatedRow,
    largest_batch,
    peak_of_rows,
    read_row,
    search,
)
from linearize.evaluation.sections.speed.numbers import SpeedNumbers, TimedRows
from linearize.evaluation.speed import cache_bytes, peak_bytes, running, weight_bytes
from linearize.evaluation.speed.equality import check_config, check_model, reference, row_difference
from linearize.evaluation.speed.running import (
    DecodeRun,
    RunConfig,
    decode,
    fastest,
    feed,
    interleaved,
    measuring,
    prefill,
    random_text,
    repeated,
    run_configs,
    time_decode,
)
from linearize.modeling.cache import MixerCacheLayer

SMALL = {
    "contexts": (14, 70), "batches": (1, 3), "new_tokens": 5, "repeats": 2, "prefill_repeats": 2, "chunk": 31,
    "check_tokens": 17, "most_rows": 0,
}  # fmt: skip
ONE_WAY: dict[str, Any] = {"caches": ("static",), "attentions": ("sdpa",)}


def eval_model(name: str, model: PreTrainedModel, fingerprint: str = "a") -> EvalModel:
    role: Any = "teacher" if name == "teacher" else "student"
    return EvalModel(name=name, role=role, path=name, model=model, tokenizer=None, fingerprint=fingerprint)  # type: ignore[arg-type]


def both(seed: int = 5, **more: Any) -> EvalContext:
    teacher = tiny(seed=seed)
    student = student_of(teacher, mixer("lolcats"))
    return EvalContext(models=(eval_model("teacher", teacher), eval_model("student", student)), **more)


def speed(**changes: Any) -> Speed:
    return Speed(**{**SMALL, **changes})


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith("ms_") and "_per_second" not in k}
    return [without_times(part) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    measured: dict[str, Any] = json.loads(json.dumps(speed(most_rows=40).run(both())))
    return measured


def test_every_point_is_measured(numbers: dict[str, Any]) -> None:
    at = [(row["model"], row["context"], row["batch"]) for row in numbers["points"]]
    assert at == [(m, c, b) for b in (1, 3) for c in (14, 70) for m in ("teacher", "student")]
    for row in numbers["points"]:
        assert row["reason"] == ""
        assert 0 < row["ms_spread"][0] <= row["ms_per_token"] <= row["ms_spread"][1]
        assert row["decode_tokens_per_second"] == pytest.approx(row["batch"] * 1000 / row["ms_per_token"])
        expected = row["batch"] * row["context"] * 1000 / row["ms_first_token"]
        assert row["prefill_tokens_per_second"] == pytest.approx(expected)
        assert row["peak_bytes"] > row["cache_bytes"] > 0
    assert {row["cache"] for row in numbers["points"] if row["model"] == "student"} == {"own"}
    assert {row["cache"] for row in numbers["points"] if row["model"] == "teacher"} <= {"static", "dynamic"}
    tried = numbers["points"][0]["ms_trials"]
    assert set(tried["token"]) == {f"{c} cache, {a}" for c in ("static", "dynamic") for a in ("sdpa", "eager")}
    assert len(numbers["checks"]) == 2 * (4 + 1) and all(check["equal"] for check in numbers["checks"])
    assert {(check["batch"], check["tokens"]) for check in numbers["checks"]} == {(1, 17), (3, 17)}
    assert numbers["models"]["student"]["trained_length"] == 256
    assert numbers["models"]["student"]["weight_bytes"] > numbers["models"]["teacher"]["weight_bytes"]


def test_the_same_seed_gives_the_same_numbers() -> None:
    small = speed(contexts=(19,), batches=(1,), **ONE_WAY)
    first, second = small.run(both()), small.run(both())
    assert without_times(first) == without_times(second)
    assert first["points"][0]["ms_per_token"] != second["points"][0]["ms_per_token"]


def test_cache_bytes_grow_for_the_teacher_and_not_for_the_student() -> None:
    cache_bytes = {}
    for kind in ("static", "dynamic"):
        small = speed(batches=(3,), repeats=1, prefill_repeats=1, caches=(kind,), attentions=("eager",))
        points = small.run(both())["points"]
        cache_bytes[kind] = {(row["model"], row["context"]): row["cache_bytes"] for row in points}
    layers, heads, dim = 3, 3, 10
    for context in (14, 70):
        assert cache_bytes["dynamic"]["teacher", context] == layers * 2 * 3 * heads * context * dim * 4
        assert cache_bytes["static"]["teacher", context] == layers * (2 * 3 * heads * (context + 10) * dim * 4 + 8)
        assert cache_bytes["dynamic"]["student", context] == cache_bytes["static"]["student", 14]


def folded_twice(self: MixerCacheLayer, *args: Any, **kwargs: Any) -> Tensor:
    """A planted fault: the first token after a prefill goes into the state twice."""
    if self.cumulative_length == 0 or getattr(self, "spoiled", False):
        return STEP(self, *args, **kwargs)
    self.spoiled = True  # type: ignore[attr-defined]
    STEP(self, *args, **kwargs)
    return STEP(self, *args, **kwargs)


STEP = MixerCacheLayer.step


def test_a_wrong_cache_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MixerCacheLayer, "step", folded_twice)
    measured = speed(contexts=(20,), batches=(1,), most_rows=12, **ONE_WAY).run(both())
    teacher, student = measured["points"]
    assert teacher["reason"] == "" and teacher["decode_tokens_per_second"] > 0
    assert "wrong output" in student["reason"]
    assert not [key for key in student if "per_second" in key or key.startswith("ms_")]
    assert set(measured["largest_batch"]["models"]) == {"teacher"}
    bad = [finding for finding in Speed.present(measured).findings if finding.level == "bad"]
    assert [finding.student for finding in bad] == ["student"] and "wrong output" in bad[0].text
    assert Speed.headline(measured) == {}


def test_a_teacher_is_timed_only_in_ways_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(running.StaticCache):
        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(keys, 1.1 * values, *args, **kwargs)

    monkeypatch.setattr(running, "StaticCache", Broken)
    measured = speed(contexts=(20,), batches=(1,)).run(both())
    row = measured["points"][0]
    assert (row["reason"], row["cache"], row["prefill_cache"]) == ("", "dynamic", "dynamic")
    wrong = [check["way"] for check in measured["checks"] if not check["equal"]]
    assert wrong == ["static cache, sdpa", "static cache, eager"]
    only = speed(contexts=(20,), batches=(1,), caches=("static",)).run(both())
    assert "wrong output" in only["points"][0]["reason"]
    teachers = [f for f in Speed.present(only).findings if f.level == "bad"]
    assert len(teachers) == 1 and teachers[0].student is None


@pytest.mark.parametrize("fault", ["position", "chunks", "decode", "nan", "crash"])
def test_the_check_sees_what_a_cache_does_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny()
    config = RunConfig("dynamic", "sdpa")
    with measuring([teacher]):
        expected = reference(teacher, text(2, 19), 4)
        assert check_config("teacher", teacher, config, expected).equal
        right = teacher.forward

        def wrong(**kwargs: Any) -> Any:
            past, new = kwargs["past_key_values"].get_seq_length(), kwargs["input_ids"].shape[1]
            if past and fault == "crash":
                raise RuntimeError("no such kernel\nat line 3")
            at_fault = {"position": past > 0, "chunks": past > 0 and new > 1, "decode": past > 19}
            if at_fault.get(fault, False):
                kwargs["position_ids"] = torch.arange(past, past + new)[None] + 1
            out = right(**kwargs)
            if fault == "nan":
                out.logits[1, -1, 3] = torch.nan
            return out

        monkeypatch.setattr(teacher, "forward", wrong)
        check = check_config("teacher", teacher, config, expected)
    assert not check.equal
    assert check.reason.startswith("does not run: no such kernel" if fault == "crash" else "wrong output")
    json.dumps(check.to_json(), allow_nan=False)


def test_the_reference_is_greedy_and_without_a_cache() -> None:
    model, ids = tiny(), text(2, 11)
    with measuring([model]):
        expected = reference(model, ids, 3)
        model.set_attn_implementation("eager")
        out = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=-1, use_cache=False)
    assert torch.equal(out[:, 11:], expected.new_BN)


def test_models_take_turns_and_are_left_as_they_were() -> None:
    ctx = both()
    calls: list[str] = []
    for one in ctx.models:
        one.model.register_forward_hook(lambda *_, name=one.name: calls.append(name))
        one.model.train()
    before = [one.model.config._attn_implementation for one in ctx.models]
    speed(
        contexts=(13,),
        batches=(1,),
    ).run(ctx)
    runs = "".join(name[0] for name in calls)  # t and s: the decode repeats are the last before the largest batches
    assert "tsts" + "tttttsssss" * 3 in runs  # two prefills each, then warm-up and two repeats of five tokens
    assert all(one.model.training for one in ctx.models)
    assert [one.model.config._attn_implementation for one in ctx.models] == before


def test_timing_keeps_what_comes_before_out_of_the_clock() -> None:
    seen: list[str] = []
    runs = {name: lambda name=name: seen.append(name) for name in "ab"}
    interleaved(runs, 2, warmup=0, before=lambda name: seen.append(name.upper()))
    assert seen == ["A", "a", "B", "b"] * 2


def test_peak_bytes_counts_what_is_held_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    outside = torch.zeros(5000)

    def run() -> Tensor:
        first = torch.empty(1000)
        del first
        second = torch.empty(2000)
        return torch.cat([second, outside[:100]])

    assert peak_bytes(torch.device("cpu"), run) == 4 * (2000 + 2100)
    assert capfd.readouterr() == ("", "")


def test_weights_count_shared_storage_once() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(7, 3))
    model.b = model.a
    model.register_buffer("c", torch.zeros(2, dtype=torch.float64))
    assert weight_bytes(model) == 4 * 21 + 16  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["static", "dynamic", "own"])
def test_a_repeated_row_reads_on_as_it_did_alone(kind: Any) -> None:
    teacher = tiny("gemma2") if kind == "dynamic" else tiny()
    model = student_of(teacher, mixer("lolcats")) if kind == "own" else teacher
    ids = random_text([model], 1, 23, 3)
    with measuring([model]):
        _, cache = prefill(model, running.new_cache(RunConfig(kind, "eager"), model, 23), ids[:, :20], 7)
        many, _ = feed(model, repeated(cache, 4), ids[:, 20:21].expand(4, -1))
        alone = model(input_ids=ids[:, :21], use_cache=False).logits[:, -1]
        difference, allowed = row_difference(alone, many)
        assert difference < allowed and torch.allclose(many[0], many[3], atol=1e-5)
        assert row_difference(alone, many.roll(1, dims=1))[0] > allowed
        decode(model, cache, ids[:, 20:])  # the original is still whole


@pytest.mark.parametrize("most", [1, 5, 17, 64])
def test_the_search_finds_the_last_that_fits(most: int) -> None:
    for largest in range(70):
        asked: list[int] = []

        def fits(size: int, largest: int = largest, asked: list[int] = asked) -> bool:
            asked.append(size)
            return size <= largest

        assert search(fits, most) == min(largest, most)
        assert max(asked) <= most


@pytest.mark.parametrize("kind", ["static", "own"])
def test_the_largest_batch_uses_the_budget_and_stays_within(kind: Any) -> None:
    teacher = tiny()
    model = student_of(teacher, mixer("lolcats")) if kind == "own" else teacher
    config, sizes = RunConfig(kind, "sdpa"), {"context": 40, "chunk": 16, "seed": 0}
    budget = peak_of_rows(model, config, rows=20, **sizes) + 100
    largest = largest_batch(model, config, budget=budget, most=500, **sizes)
    assert isinstance(largest, TimedRows) and largest.peak_bytes is not None
    assert 18 <= largest.batch <= 20 and not largest.capped
    assert 0 < largest.peak_bytes <= budget < peak_of_rows(model, config, rows=largest.batch + 3, **sizes)
    assert largest.decode_tokens_per_second == pytest.approx(1000 * largest.batch / largest.ms_per_token)
    capped = largest_batch(model, config, budget=budget, most=max(PROBES), **sizes)
    assert (capped.batch, capped.capped) == (max(PROBES), True)
    none = largest_batch(model, config, budget=1000, most=500, **sizes)
    assert none.batch == 0 and none.reason == "one row does not fit" and (none.peak_bytes or 0) > 1000


def test_more_than_a_straight_line_is_found_by_the_run_that_verifies() -> None:
    class Bent(RepeatedRow):
        def __init__(self) -> None:
            self.model = tiny()

        def peak(self, rows: int) -> int:
            return 100 + 10 * rows + (rows - 2) * (rows - 10) // 5

    assert Bent().most(470, 100) == 27
    assert Bent().most(105, 100) == 0


def test_rows_that_disturb_each_other_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    with torch.inference_mode():
        row = read_row(model, RunConfig("dynamic", "sdpa"), context=12, chunk=8, seed=0)
    right = model.forward

    def wrong(**kwargs: Any) -> Any:
        out = right(**kwargs)
        out.logits[1:] = out.logits[1:] * 0.9
        return out

    monkeypatch.setattr(model, "forward", wrong)
    with torch.inference_mode():
        assert "4 equal rows" in row.after_one(4)[1]


def test_the_budget_is_given_or_eight_rows_of_the_first(numbers: dict[str, Any]) -> None:
    largest = numbers["largest_batch"]
    assert largest["budget_from"] == "8 rows of teacher" and largest["context"] == 70
    assert largest["models"]["teacher"]["batch"] in (7, 8)
    assert largest["models"]["student"]["batch"] > 10
    small = speed(contexts=(30,), batches=(1,), memory_budget_bytes=400_000, most_rows=12, **ONE_WAY)
    section = small.run(both())["largest_batch"]
    assert (section["budget_from"], section["budget_bytes"]) == ("given", 400_000)
    assert all(0 < row["peak_bytes"] <= 400_000 for row in section["models"].values())


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, ctx = speed(contexts=(13, 20), batches=(1,), most_rows=12, **ONE_WAY), both(results=ResultCache(tmp_path))
    measure, seen = section.measure_point, []

    def once(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["context"])
        if seen == [13, 20]:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(section, "measure_point", once)
    with pytest.raises(KeyboardInterrupt):
        small.run(ctx)
    first = small.run(ctx)
    assert seen == [13, 20, 20]
    assert small.run(ctx) == first and len(seen) == 3
    other = EvalContext(models=(eval_model("teacher", tiny(), "b"),), results=ResultCache(tmp_path))
    small.run(other)
    assert seen[3:] == [13, 20]


def test_a_check_that_has_no_plain_forward_says_so() -> None:
    model = tiny("gpt2", attention="sdpa", max_position_embeddings=32)
    configs = run_configs(model, ("static", "dynamic"), ("sdpa",))
    with measuring([model]):
        checks = check_model("teacher", model, configs, random_text([model], 2, 40, 0))
        assert all(check.equal for check in check_model("teacher", model, configs, random_text([model], 2, 20, 0)))
    assert [(check.equal, check.difference, check.tokens) for check in checks] == [(False, None, 40)] * 2
    assert all(check.reason for check in checks)


def test_each_timed_decode_begins_from_a_cache_of_its_own() -> None:
    model, filled = tiny(), []
    config = RunConfig("dynamic", "sdpa")

    def cache() -> Any:
        _, new = prefill(model, running.new_cache(config, model, 20), random_text([model], 1, 9, 0), 9)
        filled.append(new)
        return new

    with measuring([model]):
        run = DecodeRun(model=model, config=config, filled=cache)
        timing = time_decode({"a": run, "b": run}, random_text([model], 1, 4, 1), 3, warmup=1)
    assert [cache.get_seq_length() for cache in filled] == [13] * 2 * (3 + 1)
    ms, (low, high) = timing["a"].ms_per_token(4)
    assert 0 < low <= ms <= high and ms == pytest.approx(250 * timing["a"].seconds)


def test_numbers_come_back_from_json_as_they_were(numbers: dict[str, Any]) -> None:
    typed = SpeedNumbers.model_validate(numbers)
    assert json.loads(json.dumps(typed.to_json())) == numbers and len(typed.timed) == len(numbers["points"])


def test_a_context_that_a_model_cannot_read_has_a_reason() -> None:
    model = tiny("gpt2", attention="sdpa", max_position_embeddings=64)
    measured = speed(contexts=(40, 90), batches=(1,), **ONE_WAY).run(
        EvalContext(models=(eval_model("teacher", model),))
    )
    assert measured["points"][0]["reason"] == ""
    assert "does not run at a context of 90" in measured["points"][1]["reason"]
    shown = Speed.present(json.loads(json.dumps(measured)))
    assert [finding.level for finding in shown.findings] == ["bad"]
    assert "Contexts beyond 64 tokens" in shown.summary


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"contexts": (5, 0)}, "contexts.1"),
        ({"batches": ()}, "batches"),
        ({"repeats": 0}, "repeats"),
        ({"chunk": -1}, "chunk"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        speed(**changes)
    assert [".".join(map(str, error["loc"])) for error in refused.value.errors()] == [field]


def test_the_usual_way_stays_unless_another_is_clearly_faster() -> None:
    static, growing = RunConfig("static", "sdpa"), RunConfig("dynamic", "sdpa")
    assert fastest({static: 1.15, growing: 1.0}) == static
    assert fastest({static: 1.3, growing: 1.0}) == growing
    student = student_of(tiny(), mixer("lolcats"))
    assert [config.cache for config in run_configs(student, ("static", "dynamic"), ("sdpa", "eager"))] == ["own"]


def test_eager_scores_that_would_fill_the_memory_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert points.eager_bytes(tiny(), 3, 70, 31) == 4 * 3 * 6 * 70 * 31
    monkeypatch.setattr(points, "EAGER_BYTES", 4 * 6 * 20 * 19)
    rows = speed(contexts=(14, 20), batches=(1,)).run(both())["points"]
    tried = [set(row["ms_trials"]["prefill"]) for row in rows if row["model"] == "teacher"]
    assert "static cache, sdpa" in tried[1] and not any("eager" in config for config in tried[1])
    assert any("eager" in config for config in tried[0]) and len(rows[2]["ms_trials"]["token"]) == 4


def crafted(
    numbers: dict[str, Any], own: list[tuple[float, float]], other: list[tuple[float, float]]
) -> dict[str, Any]:
    """Numbers with medians and half spreads of milliseconds, at contexts 100, 200, 400."""
    rows = {row["model"]: row for row in numbers["points"] if row["batch"] == 1}
    points = [
        rows[name] | {"context": c, "ms_per_token": ms, "ms_spread": [ms - half, ms + half]}
        for name, series in (("teacher", other), ("student", own))
        for c, (ms, half) in zip((100, 200, 400), series, strict=True)
    ]
    return numbers | {"points": points, "largest_batch": numbers["largest_batch"] | {"models": {}}}


@pytest.mark.parametrize(
    ("own", "level", "words"),
    [
        ([(2, 0.1), (2, 0.1), (2, 0.1)], "good", "decodes faster than the teacher from 200 tokens on"),
        ([(0.5, 0.1), (2, 0.1), (2, 0.1)], "good", "at every context measured"),
        ([(9, 0.1), (9, 0.1), (9, 0.1)], "note", "decodes slower than the teacher; at 400"),
        ([(0.5, 0.1), (9, 0.1), (9, 0.1)], "note", "decodes slower than the teacher; at 400"),
        ([(2, 0.1), (2, 0.1), (3.5, 1)], "note", "decodes as fast as the teacher, within the spread"),
    ],
)
def test_the_crossover_is_judged_beyond_noise(
    own: list[tuple[float, float]], level: str, words: str, numbers: dict[str, Any]
) -> None:
    changed = crafted(numbers, own, [(1, 0.1), (3, 0.1), (4, 0.2)])
    finding = Speed.present(changed).findings[-1]
    assert (finding.level, finding.student) == (level, "student") and words in finding.text
    assert Speed.headline(changed)["student"][0].value == f"{4 / own[-1][0]:.2g}x"


@pytest.mark.parametrize("names", [("teacher",), ("teacher", "student"), ("teacher", "a", "b"), ("a",)])
def test_what_is_shown_for_one_and_for_many(names: tuple[str, ...], numbers: dict[str, Any]) -> None:
    source = {name: "teacher" if name == "teacher" else "student" for name in names}
    many = numbers | {
        "models": {name: numbers["models"][as_] for name, as_ in source.items()},
        "points": [r | {"model": n} for n, as_ in source.items() for r in numbers["points"] if r["model"] == as_],
        "checks": [r | {"model": n} for n, as_ in source.items() for r in numbers["checks"] if r["model"] == as_],
    }
    many["largest_batch"] = numbers["largest_batch"] | {
        "models": {name: numbers["largest_batch"]["models"][as_] for name, as_ in source.items()}
    }
    shown = Speed.present(many)
    assert [table.title.split(" at ")[0] for table in shown.tables] == [
        "Prefill, decode and memory", "Largest batch", "Outputs checked before timing",
    ]  # fmt: skip
    assert len(shown.tables[0].rows) == 4 * len(names)
    assert not [finding for finding in shown.findings if finding.level == "bad"]
    students = [name for name in names if name != "teacher"] if "teacher" in names else []
    assert list(Speed.headline(many)) == students
    for plot in shown.plots:
        figure = Figure(figsize=(plot.width, plot.height), layout="constrained")
        plot.draw(figure)
        lines = figure.axes[0].get_lines()
        assert len(lines) == 2 * len(names) and all(len(line.get_xdata()) == 2 for line in lines)  # type: ignore[arg-type]


def test_cache_bytes_of_a_fresh_cache_is_nothing() -> None:
    model = tiny()
    assert cache_bytes(running.new_cache(RunConfig("dynamic", "sdpa"), model, 9)) == 0
