"""Conversions by two and four processes give the losses of one, for every stage of the common loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from many import command, together
from safetensors.torch import load_file
from test_evaluation_outputs import tiny_llama, tiny_tokenizer
from torch import Tensor

STAGE = {"tokens": 4 * 64 * 3, "batch": 4, "lr": 0.003, "evaluate_every": 2, "precision": "fp32"}
BETWEEN: dict[str, Any] = {
    "description": "Mixers between the projections.",
    "source": "A test.",
    "plan": {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 6}, "layers": [0, 2]},
    "data": {"length": 64, "heldout": 3},
    "stages": [
        {"name": "attention_transfer", **STAGE},
        {"name": "hidden_alignment", **STAGE},
        {
            "name": "lowrank", **STAGE, "loss": "kl", "train_mixers": True, "micro_batch": 1,
            "gradient_checkpointing": True,
        },
        {"name": "distill", **STAGE, "train": "no_mlp", "kl": 1.0, "old_lr_scale": 0.5},
        {"name": "lowrank", **STAGE, "merge": False, "targets": ["q", "down_proj"]},
    ],
}  # fmt: skip
WHOLE: dict[str, Any] = {
    **BETWEEN,
    "plan": {
        "mixer": {"name": "mamba2", "initialise": "calibrate"},
        "layers": "all",
        "schedule": {"kind": "progressive", "replaced": [0.34, 1.0]},
    },
    "stages": [
        {"name": "matrix_alignment", **STAGE},
        {"name": "hidden_alignment", **STAGE, "output": "block"},
        {"name": "distill", **STAGE, "train": "all", "micro_batch": 1, "gradient_checkpointing": True, "at": "last"},
    ],
}
RECIPES = {"between": BETWEEN, "whole": WHOLE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, text, and both recipes."""
    path = tmp_path_factory.mktemp("together")
    tiny_llama(1).save_pretrained(path / "teacher")
    tiny_tokenizer().save_pretrained(path / "teacher")
    stories = [f"Story {i}: {'the cat sat. ' * (i % 5 + 1)}The end of {i * 37}." for i in range(40)]
    (path / "text.txt").write_text("\n\n".join(stories))
    for name, recipe in RECIPES.items():
        (path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return path


def argv(folder: Path, recipe: str, out: str, *more: str) -> list[str]:
    data = ["--data", str(folder / "text.txt"), "--recipe", str(folder / f"{recipe}.yaml")]
    return ["convert", str(folder / "teacher"), *data, "--out", str(folder / out), "--device", "cpu", *more]


def all_weights(student: Path) -> dict[str, Tensor]:
    """Those of the student, and of adapters kept beside them."""
    weights: dict[str, Tensor] = {}
    for path in student.rglob("*.safetensors"):
        weights |= {f"{path.name}/{name}": value for name, value in load_file(path).items()}
    return weights


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest differences of all losses by stage, of the report's figures, and of the weights."""
    results: dict[str, float] = {}
    a, b = (json.loads((path / "report.json").read_text()) for path in (one, other))
    for key in ("teacher_loss", "swap_loss", "student_loss", "student_kl"):
        results[key] = abs(a[key] - b[key])
    for number, (x, y) in enumerate(zip(a["stages"], b["stages"], strict=True)):
        for kind in ("losses", "heldout"):
            pairs = zip(x["details"][kind], y["details"][kind], strict=True)
            results[f"{number} {x['name']} {kind}"] = max((abs(p[1] - q[1]) for p, q in pairs), default=0.0)
        assert len(x["details"]["losses"]) >= 2
        assert x["details"]["losses"][0][1] != x["details"]["losses"][-1][1]
    for moment, errors in a["layer_error"].items():
        results[f"layer error {moment}"] = max(
            abs(p - q) for p, q in zip(errors, b["layer_error"][moment], strict=True)
        )
    assert (a["ablation"] is None) == (b["ablation"] is None)
    weights, others = (all_weights(path) for path in (one, other))
    assert weights.keys() == others.keys()
    results["weights"] = max(float((weights[name] - others[name]).abs().max()) for name in weights)
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "ranks"), [("between", 4), ("whole", 2)])
def test_the_losses_are_those_of_one_process(folder: Path, recipe: str, ranks: int) -> None:
    assert together(1, command, argv(folder, recipe, f"{recipe}-1"), folder / "one") == [0]
    assert together(ranks, command, argv(folder, recipe, f"{recipe}-{ranks}"), folder / recipe) == [0] * ranks
    result = differences(folder / f"{recipe}-1", folder / f"{recipe}-{ranks}")
    weights = result.pop("weights")
    assert max(result.values()) < 1e-4, result  # by processor up to 5e-5: AdamW turns a rounding into a part of a step
    assert 0 < weights < 1e-3  # AdamW turns a rounding into a part of a step; and it was another computation
    assert not any(
        (folder / f"{recipe}.{kind}.{rank}").read_text() for kind in ("out", "err") for rank in range(1, ranks)
    )
    assert f"student written to {folder / f'{recipe}-{ranks}'}" in (folder / f"{recipe}.out.0").read_text()
    assert not list(folder.glob(f".{recipe}*")), "nothing is left of the run"
