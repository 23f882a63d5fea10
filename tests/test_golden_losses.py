"""One golden loss per recipe: a tiny conversion of the embedded teacher, its losses as committed in
`golden_losses.json`, so that a silent change of training shows.

A change that is meant is committed with its new numbers: `python tests/test_golden_losses.py` writes them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import linearize
from linearize.conversion import outputs
from linearize.recipes import load_recipe, recipe_names

GOLDEN = Path(__file__).with_name("golden_losses.json")
TEACHER = Path(linearize.__file__).parent / "demo" / "teacher"
RECIPES = [name for name in recipe_names() if not name.rpartition("-")[2][0].isdigit()]  # in others ratios differ
LENGTH, BATCH, STEPS = 48, 2, 3
KEYS = ("teacher_loss", "swap_loss", "student_loss", "student_kl")
NAMES = ("Lily", "Tom", "Max", "Sue")
THINGS = ("a red ball", "the big dog", "a small box", "her mom", "the tall tree")


def story(number: int) -> str:
    """A text of a few sentences in the teacher's language."""
    who, what, other = NAMES[number % 4], THINGS[number % 5], THINGS[(number * 3 + 1) % 5]
    return (
        f"Once upon a time, {who} saw {what}. {who} was very happy and wanted to play with {other}. "
        f"They went to the park {number} times. Then {who} said goodbye."
    )


def losses(name: str, folder: Path) -> dict[str, Any]:
    """What a conversion by a recipe reports when each stage takes three steps."""
    text = folder / "stories.txt"
    text.write_text("\n\n".join(map(story, range(24))), encoding="utf-8")
    overrides: dict[str, Any] = {"data.length": LENGTH, "data.heldout": 2}
    recipe = load_recipe(name)
    if getattr(recipe.plan.layers, "keep", None) == 0.125:
        overrides["plan.layers.keep"] = 0.25  # the teacher has four layers
    if getattr(recipe.plan.schedule, "kind", None) == "progressive":
        overrides["plan.schedule.replaced"] = [0.25, 0.75]
    if hasattr(recipe.plan.mixer, "window"):
        overrides["plan.mixer.window"] = 8  # shorter than the texts
    for number, stage in enumerate(recipe.stages):
        if stage.tokens != 0:
            sizes = {"tokens": STEPS * BATCH * LENGTH, "batch": BATCH, "length": None, "precision": "fp32"}
            sizes |= {"evaluate_every": 0.5, "micro_batch": None, "keep_best": False}
            overrides |= {f"stages.{number}.{key}": value for key, value in sizes.items()}
    linearize.convert(TEACHER, recipe=name, data=[text], out=folder / "student", overrides=overrides, device="cpu")
    report = json.loads((folder / "student" / "report.json").read_text(encoding="utf-8"))
    stages = {
        f"{number} {stage['name']}": [stage["loss_before"], stage["loss_after"]]
        for number, stage in enumerate(report["stages"])
    }
    return {**{key: report[key] for key in KEYS}, "stages": stages}


@pytest.mark.parametrize("name", RECIPES)
def test_the_losses_are_the_golden_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for plot in ("plot_stages", "plot_layer_error"):
        monkeypatch.setattr(outputs, plot, lambda *_: None)
    measured, golden = losses(name, tmp_path), json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert measured.pop("stages") == {
        stage: pytest.approx(pair, abs=1e-5) for stage, pair in golden.pop("stages").items()
    }
    assert measured == pytest.approx(golden, abs=1e-5)
    assert measured["student_loss"] != measured["swap_loss"], "nothing was trained"


def write(names: list[str]) -> None:
    """Commit the numbers of these recipes, or of all."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if names else {}
    for name in names or RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            golden[name] = losses(name, Path(folder))
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("LINEARIZE_CACHE", tempfile.mkdtemp())
    torch.set_num_threads(1)
    write(sys.argv[1:])
