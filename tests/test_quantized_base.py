"""Frozen base weights in 8 and 4 bits: memory falls, losses stay near, the saved student is whole and needs no
library.
"""

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
from torch import nn

from linearize.conversion.api import convert
from linearize.conversion.checks import checked_base
from linearize.errors import InputError
from linearize.metrics.report import ConversionReport, read_report
from linearize.modeling.io.adapters import LowRankChange
from linearize.modeling.io.quantized import loading_options, parts_of
from linearize.modeling.io.teacher import load_teacher
from linearize.recipes.schema import Recipe
from linearize.training.memory_simulation import tensor_bytes


def base(name: str, library: str, near: float) -> Any:
    """Weights of this kind, the library that holds them, and how near losses come to those of whole ones (nats)."""
    absent = importlib.util.find_spec(library) is None
    return pytest.param(name, library, near, id=name, marks=pytest.mark.skipif(absent, reason=f"needs {library}"))


BASES = [base("8bit", "torchao", 0.03), base("4bit", "bitsandbytes", 0.25)]
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


@pytest.fixture(scope="module")
def full(demo_teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> ConversionReport:
    """The report of the conversion over whole weights."""
    out = tmp_path_factory.mktemp("full") / "student"
    convert(demo_teacher, data=[str(text)], out=out, recipe=Recipe.from_data(RECIPE), device="cpu")
    report = read_report(out)
    assert report is not None
    return report


@pytest.mark.slow
@pytest.mark.parametrize(("base", "library", "near"), BASES)
def test_a_conversion(
    base: str, library: str, near: float, full: ConversionReport, demo_teacher: Path, text: Path, tmp_path: Path
) -> None:
    recipe = Recipe.from_data({**RECIPE, "base_weights": base})
    convert(demo_teacher, data=[str(text)], out=tmp_path / "out", recipe=recipe, device="cpu")
    small = read_report(tmp_path / "out")
    assert small is not None
    assert small.student_loss == pytest.approx(full.student_loss, abs=near)
    assert abs(small.student_loss - full.student_loss) > near / 100
    whole, saved = load_file(demo_teacher / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    same = {name for name, value in whole.items() if torch.equal(saved[f"lm.{name}"], value)}
    changed = {name for name in whole if name not in same}
    assert changed and all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj") for name in changed)
    assert {saved[f"lm.{name}"].dtype for name in whole} == {load_teacher(demo_teacher)[0].dtype}
    code = (
        f"import sys; sys.modules[{library!r}] = None; import linearize\n"
        f"m = linearize.load({str(tmp_path / 'out')!r}, device='cpu')\n"
        "import torch; print(float(m(torch.arange(3, 20)[None]).logits.std()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]
    assert float(done.stdout) > 0.1


@pytest.mark.parametrize(("base", "library", "near"), BASES)
def test_what_the_base_takes(base: Any, library: str, near: float, demo_teacher: Path) -> None:
    def held(base: Any) -> int:
        model, _ = load_teacher(demo_teacher, dtype=torch.float32, base=base)
        layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
        return tensor_bytes(part for m in layers for part in (parts_of(m.weight).values() or [m.weight]))

    assert held(base) < {"8bit": 0.3, "4bit": 0.2}[base] * held("full")


def test_a_change_of_low_rank() -> None:
    change = LowRankChange(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[3.0], [-1.0]]), 0.5)
    expected = torch.tensor([[2.5, 4.0, 1.0], [0.5, 0.0, 1.0]])
    assert torch.equal(change.added_to(torch.ones(2, 3)), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"name": "distill", "tokens": 5, "lr": 1.0}]}, r"stages.0 \(distill\) cannot run over it"),
        ({"plan": {"mixer": {"name": "mamba2"}}}, "mixers between the projections"),
        ({"stages": [{"name": "lowrank", "tokens": 5, "lr": 1.0, "merge": False}]}, "set merge of stages.0 to true"),
        ({"stages": [{"name": "attention_transfer", "tokens": 5, "lr": 1.0, "block": 1}]}, "without blocks"),
    ],
)
def test_what_cannot_run_over_it_is_refused(changes: dict[str, Any], message: str) -> None:
    recipe = Recipe.from_data({**RECIPE, "base_weights": "8bit", **changes})
    with pytest.raises(InputError, match=message):
        checked_base(recipe)
    assert checked_base(recipe.override({"base_weights": "full"})) == "full"
    skipped = Recipe.from_data({**RECIPE, "base_weights": "8bit"}).override({"stages.1.tokens": 0})
    assert checked_base(skipped) == "8bit"
    assert checked_base(skipped.override({"base_weights": "4bit"})) == "4bit"


@pytest.mark.parametrize("base", ["8bit", "4bit"])
def test_without_the_library(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"{base[0]} bits need \w+, .* pip install linearize\[quant\]"):
        loading_options(base, torch.float32, torch.device("cpu"))
