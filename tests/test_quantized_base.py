"""Frozen base weights in 8 bits: memory falls, losses stay near, the saved student is whole and needs no library."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from linearize.conversion import convert
from linearize.errors import InputError
from linearize.evaluation.report import read_report
from linearize.modeling.quantized import LowRankChange, quantization_config
from linearize.modeling.teacher import load_teacher
from linearize.recipes.base_weights import checked_base
from linearize.recipes.recipe import Recipe
from linearize.training.footprint import tensor_bytes

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
RECIPE: dict[str, Any] = {
    "plan": {"mixer": {"name": "lolcats", "window": 8, "feature_dim": 6}},
    "data": {"length": 48},
    "stages": [
        {"name": "attention_transfer", "tokens": 190, "lr": 1e-2, "batch": 2},
        {"name": "lowrank", "tokens": 190, "lr": 1e-3, "batch": 2, "rank": 3, "alpha": 5, "loss": "kl"},
    ],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": " ".join(f"the {word} ran {i}" for i in range(30))} for word in ("cat", "dog", "fox", "hen") * 6]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


@pytest.fixture(scope="module")
def demo_teacher() -> Path:
    import linearize

    return Path(linearize.__file__).parent / "demo" / "teacher"


@needs_torchao
def test_a_conversion_over_8_bits(demo_teacher: Path, text: Path, tmp_path: Path) -> None:
    reports = {}
    for base in ("full", "8bit"):
        recipe = Recipe.from_data({**RECIPE, "base_weights": base})
        convert(demo_teacher, data=[str(text)], out=tmp_path / base, recipe=recipe, device="cpu")
        reports[base] = read_report(tmp_path / base)
    full, small = reports["full"], reports["8bit"]
    assert full is not None and small is not None
    assert small.student_loss == pytest.approx(full.student_loss, abs=0.03)
    assert small.student_loss != full.student_loss
    whole, saved = load_file(demo_teacher / "model.safetensors"), load_file(tmp_path / "8bit" / "model.safetensors")
    same = {name for name, value in whole.items() if torch.equal(saved[f"lm.{name}"], value)}
    changed = {name for name in whole if name not in same}
    assert changed and all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj") for name in changed)
    assert {saved[f"lm.{name}"].dtype for name in whole} == {load_teacher(demo_teacher)[0].dtype}
    code = (
        "import sys; sys.modules['torchao'] = None; import linearize\n"
        f"m = linearize.load({str(tmp_path / '8bit')!r}, device='cpu')\n"
        "import torch; print(float(m(torch.arange(3, 20)[None]).logits.std()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]
    assert float(done.stdout) > 0.1


@needs_torchao
def test_the_base_takes_a_quarter(demo_teacher: Path) -> None:
    def held(base: Any) -> int:
        model, _ = load_teacher(demo_teacher, dtype=torch.float32, base=base)
        tensors = []
        for layer in model.model.layers:
            for parameter in layer.parameters():
                parts = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
                tensors += [getattr(parameter, part) for part in parts] or [parameter]
        return tensor_bytes(tensors)

    assert held("8bit") < 0.3 * held("full")


def test_a_change_of_low_rank() -> None:
    change = LowRankChange(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[3.0], [-1.0]]), 0.5)
    expected = torch.tensor([[2.5, 4.0, 1.0], [0.5, 0.0, 1.0]])
    assert torch.equal(change.added_to(torch.ones(2, 3)), expected)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stages": [{"name": "distill", "tokens": 5, "lr": 1.0}]}, r"stages.0 \(distill\) cannot run over it"),
        ({"plan": {"mixer": {"name": "mamba2"}}}, "mixers between the projections"),
        ({"stages": [{"name": "lowrank", "tokens": 5, "lr": 1.0, "merge": False}]}, "set merge of stages.0 to true"),
        ({"stages": [{"name": "attention_transfer", "tokens": 5, "lr": 1.0, "block": 1}]}, "without blocks"),
    ],
)
def test_what_cannot_run_over_it_is_refused(changes: dict[str, Any], told: str) -> None:
    recipe = Recipe.from_data({**RECIPE, "base_weights": "8bit", **changes})
    with pytest.raises(InputError, match=told):
        checked_base(recipe)
    assert checked_base(recipe.override({"base_weights": "full"})) == "full"
    skipped = Recipe.from_data({**RECIPE, "base_weights": "8bit"}).override({"stages.1.tokens": 0})
    assert checked_base(skipped) == "8bit"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install linearize\[quant\]"):
        quantization_config("8bit")
