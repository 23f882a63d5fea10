"""Recipes: the packaged ones, plans resolved over layers, dotted overrides, and one-line messages for what is wrong."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.recipes import DEFAULT_RECIPE, PlanConfig, Recipe, load_recipe, recipe_names
from linearize.recipes.overrides import parse_settings

MINIMAL = {
    "plan": {"mixer": {"name": "lolcats", "window": 13}},
    "data": {"length": 96},
    "stages": [
        {"name": "attention_transfer", "tokens": 7000, "lr": 0.01},
        {"name": "lowrank", "tokens": 0, "lr": 3e-4},
    ],
}


def minimal(**changes: Any) -> Recipe:
    return Recipe.from_data(MINIMAL | changes)


def plan(**fields: Any) -> PlanConfig:
    return minimal(plan={"mixer": {"name": "lolcats", "window": 13}, **fields}).plan


def converted(plan: PlanConfig, num_layers: int) -> list[int]:
    return [i for i, mixer in enumerate(plan.resolve(num_layers)) if mixer is not None]


def refusal(action: Any) -> str:
    """The message of the InputError that an action ends with; always one line."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# packaged recipes


def test_the_promised_recipes_are_packaged() -> None:
    assert {"lolcats", "lolcats-sliding", "hedgehog", "t2r", DEFAULT_RECIPE} <= set(recipe_names())
    assert DEFAULT_RECIPE == "window-linear"


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipe_is_described_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert 10 < len(recipe.description) <= 110, "one line of `linearize recipes`"
    assert recipe.source
    (tmp_path / "as-run.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "as-run.yaml") == recipe
    assert load_recipe(str(tmp_path / "as-run.yaml")).to_yaml() == recipe.to_yaml()


def test_lolcats_has_the_published_hyperparameters() -> None:
    recipe = load_recipe("lolcats")
    mixer, (transfer, lowrank) = recipe.plan.mixer, recipe.stages
    assert (mixer.window, mixer.window_shape, mixer.feature_map, mixer.feature_dim) == (64, "terraced", "hedgehog", 64)
    assert (recipe.data.length, recipe.plan.layers) == (1024, "all")
    assert [stage.name for stage in recipe.stages] == ["attention_transfer", "lowrank"]
    assert (transfer.tokens, transfer.lr, lowrank.tokens, lowrank.lr) == (20_000_000, 1e-2, 40_000_000, 1e-4)
    assert {(stage.batch, stage.schedule, stage.clip, stage.precision) for stage in recipe.stages} == {
        (8, "plateau", 1.0, "bf16")
    }
    assert (lowrank.rank, lowrank.alpha, lowrank.dropout, lowrank.loss) == (8, 16, 0.0, "ce")


def test_variants_differ_from_lolcats_where_they_say() -> None:
    lolcats = load_recipe("lolcats")
    assert (
        load_recipe("lolcats-sliding").plan.mixer == lolcats.override({"plan.mixer.window_shape": "sliding"}).plan.mixer
    )
    hedgehog, t2r = load_recipe("hedgehog"), load_recipe("t2r")
    assert (hedgehog.plan.mixer.window, hedgehog.stages[0].mse, hedgehog.stages[0].weights_ce) == (0, 0.0, 1.0)
    assert (t2r.plan.mixer.window, t2r.plan.mixer.feature_map) == (0, "t2r")
    assert [(stage.name, stage.train_mixers) for stage in t2r.stages] == [("lowrank", True)]


def test_mamba_in_llama_has_the_published_hyperparameters() -> None:
    recipe = load_recipe("mamba-in-llama")
    first, second, third = recipe.stages
    assert [stage.name for stage in recipe.stages] == ["distill", "distill", "dpo"]
    assert (first.kl, first.ce, first.lr, first.betas, first.clip) == (0.1, 1.0, 8e-5, (0.9, 0.98), 0.1)
    assert (first.train, second.train, second.kl, second.ce, second.lr) == ("mixers", "all", 1.0, 0.0, 2e-5)
    assert (third.beta, third.lr, third.epochs, third.tokens, third.warmup) == (0.01, 5e-7, 1, 0, 0.1)
    assert (recipe.data.length, second.batch, recipe.plan.mixer.initialise) == (2048, 64, "copy")
    assert converted(recipe.plan, 32) == list(range(0, 32, 2)), "ssm_layers of the published 50% model"


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_every_ratio_has_a_recipe_that_differs_in_nothing_else(family: str) -> None:
    whole = load_recipe(f"{family}-in-llama")
    assert whole.plan.mixer == MIXERS[family]()
    for name, ratio, kept in (("25", 0.25, 8), ("12.5", 0.125, 4), ("0", 0, 0)):
        recipe = load_recipe(f"{family}-in-llama-{name}")
        assert recipe.plan.layers.keep == ratio and len(converted(recipe.plan, 32)) == 32 - kept
        assert (recipe.stages, recipe.data, recipe.plan.mixer) == (whole.stages, whole.data, whole.plan.mixer)


def test_scheduled_recipes_have_the_published_steps() -> None:
    progressive, stepwise = (load_recipe(f"mamba2-in-llama-{kind}") for kind in ("progressive", "stepwise"))
    sizes = [len(step) for step in progressive.plan.steps(converted(progressive.plan, 32), 32)]
    assert sizes == [8, 16, 24, 28]
    steps = stepwise.plan.steps(converted(stepwise.plan, 32), 32)
    assert [len(step) for step in steps] == list(range(1, 33)) and steps[0] == [0] and steps[1] == [0, 1]
    assert [stage.at for stage in stepwise.stages] == ["each", "last", "last"]


def test_alignment_recipes_have_the_published_tokens_and_rates() -> None:
    mohawk, radlads, hybrid = (load_recipe(name) for name in ("mohawk", "radlads", "gdn-hybrid"))
    assert [(stage.name, stage.tokens) for stage in mohawk.stages] == [
        ("matrix_alignment", 80_000_000), ("hidden_alignment", 160_000_000), ("distill", 2_760_000_000),
    ]  # fmt: skip
    assert mohawk.stages[1].output == "block"
    align, distill, extend = radlads.stages
    assert (align.tokens, align.lr, align.min_lr_ratio * align.lr) == (10**8, 1e-3, pytest.approx(1e-5))
    assert (radlads.data.length, distill.kl, distill.ce, extend.kl, extend.length) == (512, 1.0, 0.0, 0.0, 4096)
    align, distill = hybrid.stages
    assert (align.length, hybrid.data.length, hybrid.plan.mixer.initialise) == (512, 4096, "calibrate")
    assert (distill.lr, distill.lr * distill.old_lr_scale) == (1e-4, pytest.approx(7e-6))


def test_liger_and_supra_have_the_published_settings() -> None:
    liger, supra = load_recipe("liger"), load_recipe("supra")
    (lora,), (train,) = liger.stages, supra.stages
    assert (liger.plan.mixer.name, liger.plan.mixer.window, lora.targets) == ("gla", 64, ("q", "k", "v"))
    assert (lora.lr, lora.tokens, lora.rank, lora.alpha, lora.loss) == (1e-3, 20_000_000, 8, 8, "ce")
    assert (supra.plan.mixer.name, train.kl, train.ce, train.train) == ("retention", 0.0, 1.0, "all")


# the plan


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ([4, 0], 5, [0, 4]),
        ([1, -1], 7, [1, 6]),
        ({"every": 3}, 8, [0, 3, 6]),
        ({"keep": [0, -1]}, 5, [1, 2, 3]),
        ({"keep": 0.5}, 7, [0, 2, 4, 6]),
        ({"keep": 0.5}, 10, [0, 2, 4, 6, 8]),
        ({"keep": 0.25}, 8, [0, 1, 3, 4, 5, 7]),
        ({"keep": 0.125}, 16, [i for i in range(16) if i not in (4, 12)]),
        ({"keep": 0}, 2, [0, 1]),
        ({"keep": 0.75}, 5, [2]),
    ],
)
def test_layers_are_resolved(layers: Any, num_layers: int, expected: list[int]) -> None:
    assert converted(plan(layers=layers), num_layers) == expected


@pytest.mark.parametrize("num_layers", [5, 6, 23, 32])
@pytest.mark.parametrize("ratio", [0.125, 0.2, 0.3, 0.5, 0.7])
def test_kept_layers_are_the_asked_number_and_evenly_spread(ratio: float, num_layers: int) -> None:
    kept = sorted(set(range(num_layers)) - set(converted(plan(layers={"keep": ratio}), num_layers)))
    assert abs(len(kept) - ratio * num_layers) <= 0.5 + 1e-9
    gaps = {after - before for before, after in itertools.pairwise(kept)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_overrides_put_other_mixers_in_single_layers() -> None:
    other = {"name": "sliding_window", "window": 5}
    mixers = plan(layers={"keep": [0]}, overrides={2: other, -1: other}).resolve(5)
    assert [getattr(mixer, "name", None) for mixer in mixers] == [
        None, "lolcats", "sliding_window", "lolcats", "sliding_window",
    ]  # fmt: skip
    assert [getattr(mixer, "window", None) for mixer in mixers] == [None, 13, 5, 13, 5]


@pytest.mark.parametrize(
    ("fields", "num_layers", "words"),
    [
        ({"layers": [0, 5]}, 5, ["layer 5", "5 layers", "0 to 4"]),
        ({"layers": [-6]}, 5, ["layer -6", "-5 to -1"]),
        ({"layers": {"keep": [7]}}, 5, ["plan.layers.keep", "layer 7"]),
        ({"layers": [4, -1]}, 5, ["layer 4 twice"]),
        ({"layers": []}, 5, ["nothing to convert"]),
        ({"layers": {"keep": [0, 1]}}, 2, ["nothing to convert"]),
        ({"layers": {"keep": 0.95}}, 5, ["nothing to convert"]),
        ({"layers": {"keep": 0.05}}, 5, ["0.05", "keeps none of 5", "0.1"]),
        ({"overrides": {5: {"name": "lolcats"}}}, 5, ["plan.overrides", "layer 5"]),
        ({"layers": [0], "overrides": {3: {"name": "lolcats"}}}, 5, ["layer 3 is not converted"]),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(fields: Any, num_layers: int, words: list[str]) -> None:
    message = refusal(lambda: plan(**fields).resolve(num_layers))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "layers", ["al", 3, None, {"keep": 1.0}, {"keep": -0.1}, {"keep": True}, {"every": 0}, {"kep": 0.5}, [0.5], {}]
)
def test_layers_of_no_known_form_are_refused(layers: Any) -> None:
    message = refusal(lambda: plan(layers=layers))
    assert message.startswith("plan.layers: ")
    assert "allowed" in message or "ratio" in message


# overrides


def test_override_sets_values_and_leaves_the_original_alone() -> None:
    recipe = minimal()
    changed = recipe.override({"plan.mixer.window": 16, "stages.0.tokens": "1e6", "data.length": "2k", "seed": 3})
    assert (changed.plan.mixer.window, changed.stages[0].tokens, changed.data.length, changed.seed) == (
        16,
        10**6,
        2000,
        3,
    )
    assert (recipe.plan.mixer.window, recipe.stages[0].tokens, recipe.data.length, recipe.seed) == (13, 7000, 96, 0)
    assert changed.stages[1] == recipe.stages[1]
    assert recipe.override({}) == recipe


def test_override_reaches_defaults_plans_and_overrides() -> None:
    changed = minimal().override(
        {"stages.1.betas": [0.9, 0.98], "plan.layers.keep": 0.5, "plan.overrides.2.name": "sliding_window",
         "plan.overrides.2.window": 7}
    )  # fmt: skip
    assert changed.stages[1].betas == (0.9, 0.98)
    assert [getattr(mixer, "window", None) for mixer in changed.plan.resolve(5)] == [13, None, 7, None, 13]
    assert set(yaml.safe_load(changed.to_yaml())["plan"]["overrides"]) == {2}
    assert converted(changed.override({"plan.layers.every": 2}).plan, 5) == [0, 2, 4]
    assert converted(changed.override({"plan.layers": [2]}).plan, 5) == [2]


def test_another_mixer_starts_from_its_own_defaults_and_keeps_what_both_have() -> None:
    recipe = minimal(plan={"mixer": {"name": "lolcats", "window": 13, "feature_map": "elu"}})
    changed = recipe.override({"plan.mixer.num_sinks": 2, "plan.mixer.name": "sliding_window"})
    assert changed.plan.mixer == MIXERS["sliding_window"](window=13, num_sinks=2)
    message = refusal(lambda: recipe.override({"plan.mixer.name": "sliding_window", "plan.mixer.feature_map": "exp"}))
    assert "'plan.mixer.feature_map'" in message and "plan.mixer.window" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"plan.mixer.windw": 16}, ["'plan.mixer.windw'", "did you mean 'plan.mixer.window'"]),
        ({"plan.mixr.window": 16}, ["did you mean 'plan.mixer.window'"]),
        ({"window": 16}, ["did you mean 'plan.mixer.window'"]),
        ({"stages.1.token": 5}, ["did you mean 'stages.1.tokens'"]),
        ({"data.lenght": 5}, ["did you mean 'data.length'"]),
        ({"stages.2.tokens": 5}, ["stages has 2 entries"]),
        ({"stages.-1.tokens": 5}, ["stages has 2 entries"]),
        ({"plan.mixer.name": "lolcat"}, ["plan.mixer.name", "did you mean 'lolcats'", "sliding_window"]),
        ({"stages.0.name": "lowrnk"}, ["stages.0.name", "did you mean 'lowrank'"]),
        ({"plan.mixer.window": -3}, ["plan.mixer.window", "-3"]),
        ({"plan.mixer.feature_dim": 0}, ["plan.mixer.feature_dim", "0"]),
        ({"plan.mixer.window_shape": "slidng"}, ["plan.mixer.window_shape", "'slidng'", "'sliding'", "'terraced'"]),
        ({"stages.0.tokens": "many"}, ["stages.0.tokens", "'many'", "2M"]),
        ({"stages.0.lr": 0}, ["stages.0.lr", "0"]),
        ({"plan.overrides.3.window": 5}, ["plan.overrides.3.name is missing", "lolcats"]),
        ({"plan.mixer": "lolcats"}, ["plan.mixer", "'lolcats'", "mapping"]),
    ],
)
def test_a_wrong_override_is_one_line_that_helps(settings: dict[str, Any], words: list[str]) -> None:
    message = refusal(lambda: minimal().override(settings))
    assert all(word in message for word in words), message


def test_settings_of_the_command_line_are_yaml() -> None:
    inputs = ["plan.mixer.window=16", "stages.0.tokens=1e6", "plan.layers={keep: [0, -1]}", "data.self_prompt=a=b"]
    assert parse_settings(inputs) == {
        "plan.mixer.window": 16, "stages.0.tokens": "1e6", "plan.layers": {"keep": [0, -1]}, "data.self_prompt": "a=b",
    }  # fmt: skip


@pytest.mark.parametrize("value", [["seed"], ["=3"], ["seed="], ["seed=1", "seed=2"], ["plan.layers={keep"]])
def test_settings_that_cannot_be_read_are_refused(value: list[str]) -> None:
    assert "setting" in refusal(lambda: parse_settings(value))


# files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda data: data["plan"]["mixer"].update(windw=3),
            ["'plan.mixer.windw'", "did you mean 'plan.mixer.window'"],
        ),
        (lambda data: data.update(stage=[]), ["'stage'", "did you mean 'stages'"]),
        (lambda data: data.pop("plan"), ["plan is missing"]),
        (lambda data: data["stages"][1].pop("lr"), ["stages.1.lr is missing"]),
        (lambda data: data["plan"]["mixer"].update(name="mambo"), ["'mambo'", "lolcats"]),
        (
            lambda data: data["plan"].update(overrides={2: {"name": "lolcats", "wndow": 3}}),
            ["'plan.overrides.2.window'"],
        ),
    ],
)
def test_a_wrong_file_names_file_key_and_what_is_allowed(change: Any, words: list[str], tmp_path: Path) -> None:
    data = yaml.safe_load(yaml.safe_dump(MINIMAL))
    change(data)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    message = refusal(lambda: load_recipe(path))
    assert all(word in message for word in [*words, "mine.yaml"]), message


def based(path: Path, **data: Any) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_file_may_change_another_recipe(tmp_path: Path) -> None:
    first = based(tmp_path / "first.yaml", base="lolcats", description="mine", set={"plan.mixer.window": 16})
    recipe, lolcats = load_recipe(first), load_recipe("lolcats")
    assert (recipe.name, recipe.description, recipe.source) == ("first", "mine", lolcats.source)
    assert recipe.plan == lolcats.override({"plan.mixer.window": 16}).plan and recipe.stages == lolcats.stages
    second = based(tmp_path / "second.yaml", base="first.yaml", seed=3, set={"stages.0.tokens": "3k"})
    assert (load_recipe(second).plan, load_recipe(second).seed) == (recipe.plan, 3)
    assert load_recipe(second).stages[0].tokens == 3000 and load_recipe(second).name == "second"
    (tmp_path / "as-run.yaml").write_text(load_recipe(second).to_yaml())
    assert load_recipe(tmp_path / "as-run.yaml") == load_recipe(second), "the recipe as run needs no base"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"base": "lolcat"}, ["unknown recipe 'lolcat'", "lolcats"]),
        ({"base": "none.yaml"}, ["none.yaml", "no such file"]),
        ({"base": "lolcats", "stages": []}, ["mine.yaml", "'stages'", "set: {KEY: VALUE}"]),
        ({"base": "lolcats", "set": {"plan.mixer.windw": 3}}, ["mine.yaml", "did you mean 'plan.mixer.window'"]),
        ({"base": "lolcats", "set": ["plan.mixer.window"]}, ["mine.yaml", "mapping"]),
        ({"base": "mine.yaml"}, ["mine.yaml", "leads back to itself"]),
    ],
)
def test_a_wrong_base_is_one_line_that_helps(data: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    message = refusal(lambda: load_recipe(based(tmp_path / "mine.yaml", **data)))
    assert all(word in message for word in words), message


def test_a_file_needs_no_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(MINIMAL))
    assert load_recipe(tmp_path / "mine.yml").name == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plan: {mixer: [", ["not valid YAML", "line 1"]),
        ("- plan\n", ["mapping", "list"]),
        ("", ["mapping"]),
        ("seed: 1\nseed: 2\n", ["'seed' is given twice", "line 2"]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    message = refusal(lambda: load_recipe(tmp_path / "mine.yaml"))
    assert all(word in message for word in [*words, "mine.yaml"]), message


def test_unknown_names_and_missing_files_are_refused(tmp_path: Path) -> None:
    assert "did you mean 'lolcats'" in refusal(lambda: load_recipe("lolcat"))
    assert "no such file" in refusal(lambda: load_recipe(tmp_path / "none.yaml"))
