"""Schedules: which layers are converted in which step, and conversions that go step by step and survive a kill."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import test_convert
import torch
import yaml
from models import text, tiny
from test_convert import KillAt, Killed, convert, same_weights, weights

from linearize.errors import InputError
from linearize.recipes import PlanConfig, Recipe
from linearize.recipes.schedule import Progressive, Stepwise
from linearize.training.data.loading import Document
from linearize.training.data.packing import IndexedRows
from linearize.training.data.train_dataset import TrainDataset

folder = test_convert.folder  # a fixture: a teacher with its tokenizer, and text

LOLCATS = {"name": "lolcats", "window": 4, "feature_dim": 3}


def plan(**fields: Any) -> PlanConfig:
    return Recipe.from_data({"plan": {"mixer": LOLCATS, **fields}, "stages": []}).plan


def steps(schedule: dict[str, Any], num_layers: int, **fields: Any) -> list[list[int]]:
    result = plan(schedule=schedule, **fields)
    converted = [i for i, mixer in enumerate(result.resolve(num_layers)) if mixer is not None]
    return result.steps(converted, num_layers)


# the steps


@pytest.mark.parametrize(
    ("replaced", "keep", "num_layers", "counts"),
    [
        ([0.25, 0.5, 0.75, 0.875], 0.125, 32, [8, 16, 24, 28]),
        ([0.25, 0.5, 0.75, 0.875], 0.125, 5, [1, 3, 4]),
        ([0.25, 0.5, 0.75, 1.0], 0, 7, [2, 4, 5, 7]),
        ([0.5], 0.5, 6, [3]),
        ([0.01, 0.5], 0.5, 6, [3]),
    ],
)
def test_progressive_steps_have_the_asked_sizes_and_hold_each_other(
    replaced: list[float], keep: float, num_layers: int, counts: list[int]
) -> None:
    result = steps({"kind": "progressive", "replaced": replaced}, num_layers, layers={"keep": keep})
    assert [len(step) for step in result] == counts
    assert all(set(before) < set(after) for before, after in itertools.pairwise(result))
    assert all(step == sorted(step) for step in result)
    whole = plan(layers={"keep": keep}).resolve(num_layers)
    assert result[-1] == [i for i, mixer in enumerate(whole) if mixer is not None]


def test_progressive_steps_spread_over_the_layers() -> None:
    first, second, third, last = Progressive(replaced=(0.25, 0.5, 0.75, 1.0)).steps(range(16), 16)
    for step in (first, second):
        gaps = {after - before for before, after in itertools.pairwise(step)}
        assert max(gaps) - min(gaps) <= 3 and min(step) <= 4 and max(step) >= 11
    assert first == [3, 7, 11, 15] and len(third) == 12 and last == list(range(16))


def test_stepwise_converts_one_layer_at_a_time_in_either_order() -> None:
    assert steps({"kind": "stepwise"}, 4, layers=[3, 0, 2]) == [[0], [0, 2], [0, 2, 3]]
    assert Stepwise(order="last_to_first").steps([0, 2, 3], 4) == [[3], [2, 3], [0, 2, 3]]


def test_without_a_schedule_there_is_one_step() -> None:
    assert plan(layers=[2, 0]).steps([0, 2], 3) == [[0, 2]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schedule": {"kind": "progressive", "replaced": [0.5, 0.25]}}, ["plan.schedule.replaced", "increasing"]),
        ({"schedule": {"kind": "progressive", "replaced": [0.5, 1.25]}}, ["plan.schedule.replaced", "up to 1"]),
        ({"schedule": {"kind": "progressive", "replaced": []}}, ["plan.schedule.replaced"]),
        ({"schedule": {"kind": "stepwize"}}, ["plan.schedule.kind", "did you mean 'stepwise'"]),
        ({"schedule": {"replaced": [0.5]}}, ["plan.schedule.kind is missing", "progressive", "stepwise"]),
        ({"schedule": {"kind": "stepwise", "order": "last"}}, ["plan.schedule.order", "first_to_last"]),
        ({"schedule": {"kind": "stepwise", "replaced": [1.0]}}, ["plan.schedule.replaced", "order"]),
        ({"layers": {"keep": 0.5, "select": "best"}}, ["plan.layers", "'best'", "sensitivity"]),
        ({"layers": {"keep": [0], "select": "sensitivity"}}, ["plan.layers", "list of layers"]),
        ({"layers": {"select": "sensitivity"}}, ["plan.layers", "keep: RATIO"]),
    ],
)
def test_a_wrong_schedule_or_choice_is_one_line_that_helps(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        plan(**fields)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_fractions_that_do_not_end_with_the_plan_are_refused() -> None:
    with pytest.raises(InputError, match=r"ends with 0\.75, 5 of 6 layers.*converts 3: end it with 0\.5 or change"):
        steps({"kind": "progressive", "replaced": [0.25, 0.75]}, 6, layers={"keep": 0.5})


def test_schedules_can_be_set_by_dotted_keys() -> None:
    recipe = Recipe.from_data({"plan": {"mixer": LOLCATS}, "stages": []})
    stepwise = recipe.override({"plan.schedule.kind": "stepwise", "plan.schedule.order": "last_to_first"})
    assert stepwise.plan.schedule == Stepwise(order="last_to_first")
    other = stepwise.override({"plan.schedule.kind": "progressive"})
    assert other.plan.schedule == Progressive() and other.override({"plan.schedule": None}).plan.schedule is None
    chosen = recipe.override({"plan.layers.keep": 0.25, "plan.layers.select": "sensitivity"})
    assert chosen.plan.needs_scores and chosen.override({"plan.layers.keep": 0.5}).plan.needs_scores
    assert not chosen.override({"plan.layers.every": 2}).plan.needs_scores
    assert Recipe.from_data(yaml.safe_load(chosen.to_yaml())) == chosen


def test_the_costliest_layers_are_kept() -> None:
    chosen = plan(layers={"keep": 0.4, "select": "sensitivity"})
    mixers = chosen.resolve(5, [0.2, 0.9, 0.1, 0.9, 0.3])
    assert [i for i, mixer in enumerate(mixers) if mixer is None] == [1, 3]
    tied = plan(layers={"keep": 0.2, "select": "sensitivity"}).resolve(5, [0.1, 0.9, 0.1, 0.9, 0.3])
    assert [i for i, mixer in enumerate(tied) if mixer is None] == [1]
    with pytest.raises(InputError, match="keeps none of 5"):
        plan(layers={"keep": 0.01, "select": "sensitivity"}).resolve(5, [0.0] * 5)
    with pytest.raises(InputError, match="nothing to convert"):
        plan(layers={"keep": 0.95, "select": "sensitivity"}).resolve(5, [0.0] * 5)
    with pytest.raises(InputError, match=r"overrides: .*sensitivity chooses the layers; name them"):
        plan(layers={"keep": 0.4, "select": "sensitivity"}, overrides={4: LOLCATS}).resolve(5, [0.0] * 5)


# the text


def documents() -> TrainDataset:
    results = [Document(tokens=[3 + (7 * n + i) % 50 for i in range(5 + n % 4)], loss_mask=[1] * (5 + n % 4))
             for n in range(31)]  # fmt: skip
    return TrainDataset(documents=results, pad_token_id=1)


def rows_of(rows: IndexedRows) -> list[tuple[int, ...]]:
    return [tuple(row) for row in rows.in_memory().input_ids.tolist()]


def test_parts_of_the_text_share_no_row_and_lose_none() -> None:
    dataset = documents()
    parts = [dataset.rows(12, part, 3) for part in range(3)]
    together = [row for part in parts for row in rows_of(part)]
    assert sorted(together) == sorted(rows_of(dataset.rows(12))) and len({len(part) for part in parts}) <= 2
    assert all({tensor.shape for tensor in part.take([0, 2]).values()} == {(2, 12)} for part in parts)
    assert dataset.rows(7).length == 7
    with pytest.raises(InputError, match=r"fewer than the schedule's 99 steps"):
        dataset.rows(12, 0, 99)


def test_a_sample_is_the_same_each_time_and_no_longer_than_the_text() -> None:
    dataset = documents()
    one, other = (dataset.sample(12, 60, 2) for _ in range(2))
    assert [tuple(batch["input_ids"].shape) for batch in one] == [(2, 12), (2, 12), (1, 12)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))
    everything = sum(len(batch["input_ids"]) for batch in dataset.sample(12, 10**6, 4))
    assert everything == len(dataset.rows(12))


# conversions

STEPWISE: dict[str, Any] = {
    "name": "by-steps",
    "plan": {"mixer": {"name": "mamba2"}, "schedule": {"kind": "stepwise", "order": "last_to_first"}},
    "data": {"length": 40, "heldout": 0.2},
    "stages": [
        {"name": "hidden_alignment", "tokens": 370, "lr": 1e-2, "batch": 3},
        {"name": "distill", "tokens": 360, "lr": 1e-3, "batch": 3, "train": "all", "kl": 1.0},
        {"name": "distill", "tokens": 240, "lr": 1e-3, "batch": 3, "train": "no_mlp", "at": "last", "length": 24},
    ],
}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_stages", "plot_layer_error"):
        monkeypatch.setattr(f"linearize.conversion.outputs.{name}", lambda *_: None)


@pytest.fixture(scope="module")
def by_steps(folder: Path) -> Path:
    (folder / "by-steps.yaml").write_text(yaml.safe_dump(STEPWISE))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_stages", "plot_layer_error"):
            patch.setattr(f"linearize.conversion.outputs.{name}", lambda *_: None)
        convert(folder, folder / "by-steps", recipe=folder / "by-steps.yaml")
    return folder / "by-steps"


def test_a_stepwise_conversion_is_reported_step_by_step(by_steps: Path) -> None:
    report = json.loads((by_steps / "report.json").read_text())
    stages = report["stages"]
    assert [stage["name"] for stage in stages] == [
        "hidden_alignment (1/3)", "distill (1/3)", "hidden_alignment (2/3)", "distill (2/3)",
        "hidden_alignment (3/3)", "distill (3/3)", "distill",
    ]  # fmt: skip
    assert [stage["details"]["layers"] for stage in stages] == [[2], [2], [1, 2], [1, 2], *[[0, 1, 2]] * 3]
    assert report["provenance"]["schedule"] == [[2], [1, 2], [0, 1, 2]]
    assert [stage["tokens"] for stage in stages] == [240, 120, 240, 120, 240, 120, 288]
    one, two, three = (stage["trainable_parameters"] for stage in stages[:5:2])
    assert two == 2 * one and three == 3 * one
    assert stages[0]["loss_before"] == report["swap_loss"] and stages[1]["loss_before"] == stages[0]["loss_after"]
    assert stages[2]["loss_before"] != stages[1]["loss_after"], "the swap of the next layer costs something"
    config = json.loads((by_steps / "config.json").read_text())
    assert all(entry["name"] == "mamba2" for entry in config["plan"])
    assert set(report["layer_error"]) == {"swap", "3of3-0-hidden_alignment", "3of3-1-distill", "3of3-2-distill"}
    assert all(len(errors) == 3 for errors in report["layer_error"].values())


def test_each_step_trains_on_rows_of_its_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize.conversion import run as conversion

    seen: dict[str, set[tuple[int, ...]]] = {}
    real = conversion.run_stage

    def watched(run: Any, stage: Any, stream: Any, *args: Any, name: str, **rest: Any) -> Any:
        rows = seen.setdefault(name, set())

        def through(start: int) -> Any:
            for batch in stream(start):
                rows.update(tuple(row) for row in batch["input_ids"].tolist())
                yield batch

        return real(run, stage, through, *args, name=name, **rest)

    monkeypatch.setattr(conversion, "run_stage", watched)
    convert(folder, tmp_path / "s", recipe=Recipe.from_data(STEPWISE), overrides={"stages.1.tokens": 0})
    first, second, third = (seen[f"{step}of3-0-hidden_alignment"] for step in (1, 2, 3))
    assert first and second and third and not (first & second or first & third or second & third)


@pytest.mark.parametrize(("stage", "step"), [("2of3-0", 1), ("3of3-2", 2)])
def test_killed_in_any_step_it_ends_with_the_same_weights(
    by_steps: Path,
    folder: Path,
    tmp_path: Path,
    stage: str,
    step: int,
) -> None:
    out = tmp_path / "student"
    with pytest.raises(Killed):
        convert(folder, out, recipe=folder / "by-steps.yaml", progress=KillAt(stage, step))
    again = KillAt("nowhere", 0)
    convert(folder, out, recipe=folder / "by-steps.yaml", progress=again)
    assert same_weights(by_steps, out)
    assert again.seen[0][0].startswith(stage), "stages that had ended were run again"


def test_another_schedule_does_not_use_what_was_left(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_data(STEPWISE)
    with pytest.raises(Killed):
        convert(folder, tmp_path / "s", recipe=recipe, progress=KillAt("2of3-1", 1))
    with pytest.raises(InputError, match="belongs to another run"):
        convert(folder, tmp_path / "s", recipe=recipe, overrides={"plan.schedule.order": "first_to_last"})


def test_later_layers_start_from_the_student_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Layer 0, converted second, starts from projections that the first step trained."""
    from linearize.conversion.run import Conversion

    results: dict[str, torch.Tensor] = {}
    real = Conversion._start_step

    def watched(self: Any, step: int) -> None:
        if step == 1:
            results["before"] = self.student.lm.model.layers[0].self_attn.o_proj.weight.clone()
        real(self, step)
        if step == 1:
            results["start"] = self.student.mixers()[0].out_proj.weight.clone()

    stage = {"name": "distill", "tokens": 240, "lr": 1e-2, "batch": 2, "train": "all", "kl": 1.0}
    recipe = Recipe.from_data(STEPWISE | {"stages": [stage]}).override({"plan.layers": [0, 2]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Conversion, "_start_step", watched)
        convert(folder, tmp_path / "s", recipe=recipe)
    assert torch.equal(results["before"], results["start"])
    original = weights(folder / "teacher")["model.layers.0.self_attn.o_proj.weight"]
    assert not torch.equal(results["start"], original), "nothing was trained in the first step"


def test_layers_chosen_by_sensitivity_are_reported(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_data(
        STEPWISE | {"plan": {"mixer": LOLCATS, "layers": {"keep": 0.34, "select": "sensitivity"}}}
    )
    convert(folder, tmp_path / "s", recipe=recipe, overrides={f"stages.{i}.tokens": 0 for i in range(3)})
    scores = json.loads((tmp_path / "s" / "report.json").read_text())["provenance"]["layer_sensitivity"]
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    kept = [layer for layer, entry in enumerate(config["plan"]) if entry is None]
    assert kept == [max(scores, key=lambda score: score["kl"])["layer"]]
    assert len({score["kl"] for score in scores}) == 3


def test_what_cannot_run_later_is_refused_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for overrides, words in (
        ({"stages.0.name": "attention_transfer"}, r"stages\.0: attention_transfer.*mamba2.*hidden_alignment"),
        ({"stages.2.length": 65}, r"stages\.2\.length 65.*64"),
        ({"stages.1.teacher": str(folder / "nowhere")}, r"nowhere is not a model folder"),
        ({"plan.layers": {"keep": 0.9}}, r"nothing to convert"),
        ({"plan.mixer": {"name": "mamba", "initialise": "calibrate"}}, r"mixer mamba cannot be calibrated"),
        ({"plan.overrides": {1: {"name": "retention", "initialise": "calibrate"}}}, r"retention cannot be calibrated"),
        ({"stages.0.name": "matrix_alignment", "plan.overrides": {0: LOLCATS}}, r"stages\.0: matrix_align.* lolcats"),
        ({"stages.0.tokens": 10**6, "stages.0.length": 60, "data.heldout": 29}, r"stages\.0: "),
    ):
        monkeypatch.setattr("linearize.conversion.prepare.layer_sensitivity", _no_work)
        with pytest.raises(InputError, match=words) as caught:
            convert(folder, tmp_path / "s", recipe=Recipe.from_data(STEPWISE), overrides=overrides)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def _no_work(*_: Any, **__: Any) -> None:
    raise AssertionError("work was done before everything was checked")


@pytest.mark.parametrize("data", ["self", "pseudo:prompts.jsonl"])
def test_the_teacher_writes_no_text_for_stages_that_cannot_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    for name in ("self_sampler", "pseudo_labeller"):
        monkeypatch.setattr(f"linearize.conversion.text.{name}", lambda *_, **__: _no_work)
    with pytest.raises(InputError, match="nowhere is not a model folder"):
        overrides = {"stages.1.teacher": str(folder / "nowhere")}
        convert(folder, tmp_path / "s", data=[data], recipe=Recipe.from_data(STEPWISE), overrides=overrides)
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'tensorboard'"):
        convert(folder, tmp_path / "s", track=["tensorbord"])
    assert not list(tmp_path.iterdir())


def test_lengths_beyond_the_context_are_cut_with_a_warning(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed = STEPWISE | {"stages": [dict(STEPWISE["stages"][0], length=65)], "plan": {"mixer": LOLCATS}}
    with caplog.at_level(logging.WARNING, logger="linearize"):
        convert(folder, tmp_path / "s", recipe=Recipe.from_data(changed))
    assert "stages.0.length is 64" in caplog.text
    recipe = yaml.safe_load((tmp_path / "s" / "recipe.yaml").read_text())
    assert recipe["stages"][0]["length"] == 64 and recipe["data"]["length"] == 40


def test_layers_that_stay_as_they_are_take_no_step() -> None:
    from linearize.conversion.prepare import _steps
    from linearize.modeling.probe import probe
    from linearize.modeling.surgery import check_plan

    teacher = tiny("gemma3_text")  # layers 0 and 2 see 5 tokens
    expected = plan(mixer={**LOLCATS, "window": 8}, schedule={"kind": "stepwise"})
    mixers = expected.resolve(3)
    applied = check_plan(mixers, probe(teacher), "gemma3_text")
    assert _steps(expected, mixers, applied) == [[1]]
    assert teacher(text(1, 9)).logits.shape[1] == 9
