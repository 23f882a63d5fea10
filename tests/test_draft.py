"""Drafts by recipe: from a teacher or a student on disk to a draft on disk that proposes tokens to its target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_convert
import torch
from test_convert import KillAt, Killed, convert, nothing_at, same_weights, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.errors import InputError
from linearize.recipes import Recipe, load_recipe
from linearize.recipes.overrides import parse_settings
from linearize.training.stages import STAGES

folder = test_convert.folder  # a fixture: a teacher with its tokenizer, and text

SMALL: dict[str, Any] = {
    "data.length": 40, "data.heldout": 0.2, "data.self_tokens": 600, "data.self_batch": 16, "stages.0.tokens": 1200,
    "stages.0.batch": 3, "stages.0.lr": 1e-2, "stages.0.evaluate_every": 0.25, "stages.0.precision": "fp32",
}  # fmt: skip
HYBRID = {
    "plan": {"mixer": {"name": "mamba2"}, "layers": [0, 2],
             "overrides": {2: {"name": "lolcats", "window": 4, "feature_dim": 3}}},
    "data": {"length": 40, "heldout": 0.2},
    "stages": [{"name": "distill", "tokens": 240, "lr": 1e-3, "batch": 3}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_stages", "plot_layer_error"):
        monkeypatch.setattr(f"linearize.conversion.outputs.{name}", lambda *_: None)


@pytest.fixture(scope="module")
def hybrid(folder: Path) -> Path:
    """A student with Mamba-2, softmax attention and LoLCATs, one layer each."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_stages", "plot_layer_error"):
            patch.setattr(f"linearize.conversion.outputs.{name}", lambda *_: None)
        convert(folder, folder / "hybrid", recipe=Recipe.from_data(HYBRID))
    return folder / "hybrid"


def draft(folder: Path, out: Path, target: Path | None = None, data: Any = "self", **settings: Any) -> Any:
    """A draft of `target` (None: of the plain teacher); `overrides` are beside the small sizes."""
    overrides = SMALL | settings.pop("overrides", {})
    options = {"recipe": "draft", "data": data, "overrides": overrides, **settings}
    return convert(folder, out, teacher=target or folder / "teacher", **options)


def report_of(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((path / "report.json").read_text())
    return result


def learnt(report: dict[str, Any]) -> float:
    """By how much the stage brought the draft nearer to its target, KL on held-out text."""
    heldout = [loss for _, loss in report["stages"][0]["details"]["heldout"]]
    return float(heldout[0] - min(heldout))


def assisted_equals_greedy(target: Any, assistant: Any) -> bool:
    """Greedy decoding with transformers' own speculation, against greedy decoding."""
    ids = torch.tensor([[2, 9, 4, 7, 30]])
    options: dict[str, Any] = {"max_new_tokens": 19, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    return torch.equal(target.generate(ids, **options), target.generate(ids, assistant_model=assistant, **options))


# drafts of a teacher


def test_a_draft_of_a_teacher(folder: Path, tmp_path: Path) -> None:
    before = weights(folder / "teacher")
    model, out = draft(folder, tmp_path / "draft"), tmp_path / "draft"
    report, card = report_of(out), (out / "README.md").read_text()
    assert model.config.plan == [None, None] and model.config.num_hidden_layers == 2
    assert report["provenance"]["draft"] == {"layers": [0, 2], "of": 3}
    assert "# A draft of teacher\n" in card and "Layers 0, 2 of the target's 3" in card and "linearized" not in card
    assert learnt(report) > 0.02
    assert report["student_kl"] > 0 and 0 <= report["student_top1"] <= 1 and report["mixers"] == [None, None]
    assert report["stages"][0]["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert load_recipe(out / "recipe.yaml").plan.depth == 2
    now = weights(out)
    started = {name: before[name.removeprefix("lm.").replace("layers.1.", "layers.2.")] for name in now}
    assert all(now[name].shape == started[name].shape and not torch.equal(now[name], started[name]) for name in now)
    ids = torch.tensor([[2, 9, 4, 7, 30]])
    with torch.no_grad():
        assert torch.equal(linearize.load(out)(ids).logits, model(ids).logits)
    own, target = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(folder / "teacher")
    assert own.get_vocab() == target.get_vocab()
    assert assisted_equals_greedy(AutoModelForCausalLM.from_pretrained(folder / "teacher").eval(), model)


def test_it_starts_as_the_targets_layers(folder: Path, tmp_path: Path) -> None:
    layers = {"plan.depth": [-1, 0], "stages.0.tokens": 0}
    draft(folder, tmp_path / "draft", data=[folder / "text.txt"], overrides=layers)
    before, now = weights(folder / "teacher"), weights(tmp_path / "draft")
    assert all(
        torch.equal(now[name], before[name.removeprefix("lm.").replace("layers.1.", "layers.2.")]) for name in now
    )
    assert report_of(tmp_path / "draft")["provenance"]["draft"]["layers"] == [0, 2]


def test_a_draft_of_a_teacher_with_another_mixer(folder: Path, tmp_path: Path) -> None:
    mixer = {"name": "lolcats", "window": 4, "feature_dim": 3}
    recipe = {
        "plan": {"depth": 2, "mixer": mixer, "layers": [1]},
        "data": {"length": 40, "heldout": 0.2},
        "stages": [
            {"name": "attention_transfer", "tokens": 480, "lr": 1e-2, "batch": 3},
            {"name": "distill", "tokens": 240, "lr": 1e-3, "batch": 3, "kl": 1.0, "ce": 0.0, "train": "all"},
        ],
    }
    model = convert(folder, tmp_path / "draft", recipe=Recipe.from_data(recipe))
    report = report_of(tmp_path / "draft")
    assert [entry and entry["name"] for entry in model.config.plan] == [None, "lolcats"]
    swap, transferred, _ = report["layer_error"].values()
    assert len(swap) == 1 and transferred[0] < swap[0], "compared with the target's layer 2"
    assert [stage["name"] for stage in report["stages"]] == ["attention_transfer", "distill"]


@pytest.mark.parametrize("stage", ["hidden_alignment", "matrix_alignment"])
def test_layers_are_compared_with_those_of_the_same_number_in_the_draft(
    folder: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[Any] = []
    build = STAGES[stage].build

    def watched(config: Any, student: Any, teacher: Any) -> Any:
        teachers.append(teacher)
        return build(config, student, teacher)

    monkeypatch.setattr(STAGES[stage], "build", watched)
    recipe = {
        "plan": {"depth": [1, 2], "mixer": {"name": "mamba2"}},
        "data": {"length": 40, "heldout": 0.2},
        "stages": [{"name": stage, "tokens": 480, "lr": 1e-2, "batch": 3}],
    }
    convert(folder, tmp_path / "draft", recipe=Recipe.from_data(recipe))
    seen = [block.self_attn.q_proj.weight for block in teachers[0].model.layers]
    before = weights(folder / "teacher")
    kept = [before[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (1, 2)]
    assert all(torch.equal(x, y) for x, y in zip(kept, seen, strict=True))
    heldout = report_of(tmp_path / "draft")["stages"][0]["details"]["heldout"]
    assert heldout[-1][1] < heldout[0][1]
    assert all(len(errors) == 2 for errors in report_of(tmp_path / "draft")["layer_error"].values())


# drafts of a student


def test_a_draft_of_a_hybrid_student(folder: Path, hybrid: Path, tmp_path: Path) -> None:
    before, out = weights(hybrid), tmp_path / "draft"
    longer = {"plan.depth": [0, 1], "stages.0.lr": 1e-3, "stages.0.tokens": 2400, "data.self_tokens": 1500}
    model = draft(folder, out, hybrid, overrides=longer)
    report = report_of(out)
    assert [entry and entry["name"] for entry in model.config.plan] == ["mamba2", None]
    assert report["provenance"]["draft"] == {"layers": [0, 1], "of": 3} and report["teacher"] == str(hybrid)
    assert learnt(report) > 0.02 and report["layer_error"] == {}
    assert "# A draft of hybrid\n" in (out / "README.md").read_text()
    mixers = [name for name in weights(out) if ".mixer." in name]
    assert mixers and not all(torch.equal(weights(out)[name], before[name]) for name in mixers), "its mixers train"
    target = linearize.load(hybrid)
    assert assisted_equals_greedy(target, model)
    assert model.config.teacher_name == str(hybrid)


@pytest.mark.parametrize("train", ["mixers", "lowrank"])
def test_training_a_draft_leaves_its_target_alone(
    folder: Path, hybrid: Path, tmp_path: Path, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mixers too: draft and target share tensors until the draft trains."""
    import linearize.conversion.api as conversion

    targets: list[Any] = []
    prepare = conversion.prepare

    def watched(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        targets.append(prepared.teacher)
        return prepared

    monkeypatch.setattr(conversion, "prepare", watched)
    recipe: dict[str, Any] = {"name": "distill", "train": "mixers", "kl": 1.0}
    if train == "lowrank":
        recipe = {"name": "lowrank", "train_mixers": True, "loss": "kl", "rank": 2}
    stages = [{**recipe, "tokens": 480, "lr": 1e-2, "batch": 3, "keep_best": False}]
    whole = Recipe.from_data({"plan": {"depth": [0, 2]}, "data": {"length": 40, "heldout": 0.2}, "stages": stages})
    convert(folder, tmp_path / "draft", teacher=hybrid, recipe=whole)
    fresh, used = linearize.load(hybrid).state_dict(), targets[0].state_dict()
    assert all(torch.equal(fresh[name], used[name]) for name in fresh)
    assert not torch.equal(
        weights(tmp_path / "draft")["lm.model.layers.0.self_attn.mixer.A_log"],
        fresh["lm.model.layers.0.self_attn.mixer.A_log"],
    )


def test_killed_and_started_again_it_ends_with_the_same_weights(folder: Path, hybrid: Path, tmp_path: Path) -> None:
    draft(folder, tmp_path / "whole", hybrid)
    with pytest.raises(Killed):
        draft(folder, tmp_path / "draft", hybrid, progress=KillAt("distill", 5))
    assert nothing_at(tmp_path / "draft")
    second = KillAt("nowhere", 0)
    draft(folder, tmp_path / "draft", hybrid, progress=second)
    assert second.seen[0][1] > 0, "it began anew"
    assert same_weights(tmp_path / "whole", tmp_path / "draft")


def test_a_checkpoint_of_other_layers_is_not_used(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": [folder / "text.txt"]}
    with pytest.raises(Killed):
        draft(folder, tmp_path / "draft", progress=KillAt("distill", 5), overrides={"plan.depth": [0, 1]}, **options)
    with pytest.raises(InputError, match=r"belongs to another run \(draft.layers was \[0, 1\], is \[0, 2\]\)"):
        draft(folder, tmp_path / "draft", **options)


# what is refused, and what the recipe says


def test_layers_that_a_number_stands_for() -> None:
    def layers(depth: Any, num_layers: int) -> Any:
        return load_recipe("draft").override({"plan.depth": depth}).plan.draft_layers(num_layers)

    assert [layers(n, 5) for n in (1, 2, 3, 4, 5)] == [[0], [0, 4], [0, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]
    assert layers(2, 32) == [0, 31] and layers(4, 32) == [0, 10, 20, 31]
    assert layers([-1, 2, 0], 7) == [0, 2, 6] and load_recipe("lolcats").plan.draft_layers(7) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("plan.depth=0", "plan.depth: 0 given; allowed: a number of layers from 1"),
        ("plan.depth=[]", r"plan.depth: \[\] given"),
        ("plan.depth=true", "plan.depth: True given"),
        ("plan.depth=1.5", "plan.depth: 1.5 given"),
        ("plan.depth=4", "plan.depth: 4 layers given, the target has 3: give at most 3"),
        ("plan.depth=[0, 3]", "plan.depth: layer 3 given, the model has 3 layers"),
        ("plan.depth=[2, 0, -1]", r"plan.depth: \[2, 0, -1\] names layer 2 twice"),
        ("plan.depht=2", "did you mean 'plan.depth'"),
        ("plan.depth=null", "plan.mixer is missing"),
        ("plan.layers.keep=0.5", "need plan.mixer"),
        ("plan.mixer.name=lolcat", "did you mean 'lolcats'"),
        ("plan.mixer.window=4", "plan.mixer.name is missing"),
        ("stages.0.train=mixers", "distill has nothing to train"),
    ],
)
def test_bad_settings_are_refused_in_one_line(folder: Path, tmp_path: Path, settings: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        draft(folder, tmp_path / "draft", data=[folder / "text.txt"], overrides=parse_settings([settings]))
    assert "\n" not in str(caught.value) and nothing_at(tmp_path / "draft")
    assert not (tmp_path / ".draft.run").exists()


def test_a_mixer_can_be_given_by_dotted_keys() -> None:
    plan = load_recipe("draft").override(parse_settings(["plan.mixer.name=lolcats", "plan.mixer.window=4"])).plan
    assert (plan.depth, plan.mixer.name, plan.mixer.window) == (2, "lolcats", 4)  # type: ignore[union-attr]


def test_what_a_draft_of_a_student_cannot_have_is_refused(folder: Path, hybrid: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a student, whose draft keeps the mixers of its layers"):
        draft(folder, tmp_path / "draft", hybrid, overrides={"plan.mixer": {"name": "lolcats"}})
    stages = [{"name": "attention_transfer", "tokens": 480, "lr": 1e-2}]
    recipe = Recipe.from_data({"plan": {"depth": 1}, "data": {"length": 40}, "stages": stages})
    with pytest.raises(InputError, match=r"stages\.0: attention_transfer compares layers with the attention that they"):
        convert(folder, tmp_path / "draft", teacher=hybrid, recipe=recipe)
    with pytest.raises(InputError, match="is a student already"):
        convert(folder, tmp_path / "draft", teacher=hybrid)
    assert nothing_at(tmp_path / "draft")
