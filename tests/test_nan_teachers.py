"""A teacher that gives NaN is refused before anything is trained, and the learning rate is not blamed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_folder import write_teacher, write_text

import linearize
from linearize.conversion.inspections import inspect_sensitivity
from linearize.errors import InputError
from linearize.modeling.io.streamed_teacher import StreamedTeacher
from linearize.recipes.schema import Recipe

WEIGHTS, UP = "model.safetensors", "model.layers.1.mlp.up_proj.weight"
FEW: dict[str, Any] = {
    "plan.mixer.window": 4, "data.heldout": 3, "data.length": 48, "stages.0.batch": 2, "stages.1.batch": 2,
    "stages.0.tokens": 200, "stages.1.tokens": 200,
}  # fmt: skip


def diverged(folder: Path, at: tuple[int, int] | None = None, value: float = float("nan")) -> Path:
    """A teacher with one matrix, or one value of it, that is no number."""
    folder.mkdir()
    write_teacher(folder)
    tensors = load_file(folder / WEIGHTS)
    if at is None:
        tensors[UP].fill_(value)
    else:
        tensors[UP][at] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    write_text(path)
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("data", ["file", "self"])
def test_weights_that_are_no_numbers(tmp_path: Path, text: Path, data: str, value: float) -> None:
    folder, out = diverged(tmp_path / "teacher", (3, 5), value), tmp_path / "student"
    spec = str(text) if data == "file" else "self"
    calls: list[Callable[[], Any]] = [
        lambda: linearize.convert(folder, data=[spec], out=out, overrides=FEW, device="cpu"),
        lambda: inspect_sensitivity(str(folder), data=[spec], device="cpu"),
    ]
    for call in calls:
        with pytest.raises(
            InputError, match=rf"teacher {folder} itself gives NaN: its weight {re.escape(UP)}"
        ) as error:
            call()
        assert "lr" not in str(error.value).replace(str(folder), "") and "\n" not in str(error.value)
    assert not out.exists() and not list(tmp_path.glob(".student.run/*"))


def test_numbers_that_overflow(tmp_path: Path, text: Path) -> None:
    """All weights are numbers; a product is not."""
    folder = diverged(tmp_path / "teacher", (3, 5), 3e38)
    tensors = load_file(folder / WEIGHTS)
    tensors[UP.replace("up", "down")][:, 3] = 3e38
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"itself gives NaN, though all its weights are numbers: .* in float32"):
        linearize.convert(folder, data=[text], out=tmp_path / "student", overrides=FEW, device="cpu")


def test_only_on_the_text(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens from all over the vocabulary may pass where a text does not: the first held-out row is tried too."""
    from linearize.conversion import prepare as preparation

    seen: list[tuple[int, ...]] = []
    original = preparation.check_finite_outputs

    def spy(model: Any, name: str, ids_BT: Any = None) -> None:
        seen.append(() if ids_BT is None else tuple(ids_BT.shape))
        original(model, name, ids_BT)

    monkeypatch.setattr(preparation, "check_finite_outputs", spy)
    (tmp_path / "teacher").mkdir()
    write_teacher(tmp_path / "teacher")
    linearize.convert(tmp_path / "teacher", data=[text], out=tmp_path / "student", overrides=FEW, device="cpu")
    assert seen[0] == () and seen[1][0] == 1 and seen[1][1] > 20 and len(seen) == 2


def test_streams(tmp_path: Path, text: Path) -> None:
    """One that diverged is seen in samples at the start; a single value when its block is read."""
    few = {**FEW, "stages.0.block": 1, "stages.1.tokens": 0}
    for name, at in (("all", None), ("one", (3, 5))):
        folder = diverged(tmp_path / name, at)
        with pytest.raises(InputError, match=rf"itself gives NaN: its weight {re.escape(UP)}"):
            linearize.convert(folder, data=[text], out=tmp_path / "student", overrides=few, device="cpu", stream=True)
        if at is None:
            assert not (tmp_path / ".student.run").exists()
            with pytest.raises(InputError, match="itself gives NaN"):
                StreamedTeacher(str(folder), device=torch.device("cpu"))


def test_no_step_no_blame(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not seen beforehand: a loss that is NaN before the first step is not the learning rate's fault."""
    for name in ("check_finite_outputs", "check_finite_weights"):
        monkeypatch.setattr(f"linearize.conversion.prepare.{name}", lambda *args: None)
    folder = diverged(tmp_path / "teacher")
    with pytest.raises(RuntimeError, match="after step 0 of stage 'attention_transfer' is nan: no step was taken"):
        linearize.convert(folder, data=[text], out=tmp_path / "student", overrides=FEW, device="cpu")


def test_another_teacher(tmp_path: Path, text: Path) -> None:
    (tmp_path / "teacher").mkdir()
    write_teacher(tmp_path / "teacher")
    stages = [{"name": "distill", "tokens": 200, "lr": 1e-3, "batch": 2, "kl": 1.0, "teacher": ""}]
    for name, at in (("all", None), ("one", (3, 5))):
        stages[0]["teacher"] = str(diverged(tmp_path / name, at))
        plan = {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 6}}
        recipe = Recipe.from_data({"plan": plan, "data": {"length": 48, "heldout": 3}, "stages": stages})
        with pytest.raises(InputError, match=rf"{name}\S* itself gives NaN"):
            linearize.convert(tmp_path / "teacher", data=[text], out=tmp_path / "out", recipe=recipe, device="cpu")
