"""Every packaged recipe runs on a small teacher, from the swap to a student that loads; only sizes are changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_convert
import torch
from test_convert import convert

import linearize
from linearize.recipes import Recipe, load_recipe, recipe_names

folder = test_convert.folder  # a fixture: a teacher with its tokenizer, and text

SHARED = {"lolcats", "sliding_window"}  # mixers whose recipes run in other tests
NAMES = [
    name
    for name in recipe_names()
    if getattr(load_recipe(name).plan.mixer, "name", None) not in {*SHARED, None}  # none: a draft, in test_draft.py
    and not name.rpartition("-")[2][0].isdigit()  # ratios differ
]


def small(recipe: Recipe) -> dict[str, Any]:
    """Overrides that leave of a recipe all but its sizes: three layers, rows of 40 tokens, a few steps."""
    changes: dict[str, Any] = {"data.length": 40, "data.heldout": 0.2}
    for number, stage in enumerate(recipe.stages):
        if stage.tokens != 0:
            sizes = {"tokens": 240, "batch": 2, "length": None, "precision": "fp32", "evaluate_every": 0.5}
            changes |= {f"stages.{number}.{key}": value for key, value in sizes.items()}
    if hasattr(recipe.plan.mixer, "window"):
        changes["plan.mixer.window"] = 5
    if getattr(recipe.plan.layers, "keep", None) in (0.125, 0.25):
        changes["plan.layers.keep"] = 0.34
    if getattr(recipe.plan.schedule, "kind", None) == "progressive":
        changes["plan.schedule.replaced"] = [0.25, 0.66]
    return changes


@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for plot in ("plot_stages", "plot_layer_error"):
        monkeypatch.setattr(f"linearize.conversion.outputs.{plot}", lambda *_: None)
    recipe = load_recipe(name)
    student = convert(folder, tmp_path / "student", recipe=name, overrides=small(recipe))
    report = json.loads((tmp_path / "student" / "report.json").read_text())
    ran = [stage["name"].partition(" ")[0] for stage in report["stages"]]
    expected = [stage.name for stage in recipe.stages if stage.tokens != 0]
    assert list(dict.fromkeys(ran)) == list(dict.fromkeys(expected)) and len(ran) >= len(expected)
    assert all(stage["tokens"] > 0 and stage["trainable_parameters"] > 0 for stage in report["stages"])
    assert report["recipe"] == name and torch.isfinite(torch.tensor(report["student_loss"]))
    assert report["student_loss"] <= report["swap_loss"] + 0.5, "training broke the student"
    assert {entry["name"] for entry in student.config.plan if entry} == {recipe.plan.mixer.name}
    assert name != "gdn-hybrid" or all(
        entry is None or entry["initialise"] == "calibrate" for entry in student.config.plan
    )
    assert (report["ablation"] is not None) == (name == "liger"), "the one here with a window and a linear branch"
    assert all(len(errors) == sum(map(bool, student.config.plan)) for errors in report["layer_error"].values())
    ids = torch.tensor([[2, 9, 4, 7, 30]])
    with torch.no_grad():
        assert torch.equal(linearize.load(tmp_path / "student")(ids).logits, student(ids).logits)
