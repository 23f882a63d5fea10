"""`lowrank` that goes on from the adapter of an earlier conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import text
from safetensors.torch import load_file, save_file
from teacher_folder import write_teacher, write_text

import linearize
from linearize.errors import InputError

PLAN = {"data.length": 32, "data.heldout": 3, "plan.mixer.window": 4, "plan.mixer.feature_dim": 6}
FIRST = {
    **PLAN, "plan.layers": [0, 2], "stages.0.tokens": 512, "stages.1.tokens": 512, "stages.0.batch": 2,
    "stages.1.batch": 2,
}  # fmt: skip
STILL = {"stages.1.lr": 1e-12, "stages.1.tokens": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, text, and the adapter of a first conversion."""
    folder = tmp_path_factory.mktemp("earlier")
    write_teacher(folder / "teacher")
    write_text(folder / "text.txt", 60)
    linearize.convert(
        folder / "teacher", data=[folder / "text.txt"], out=folder / "first", overrides=FIRST, adapter_only=True,
        device="cpu",
    )  # fmt: skip
    return folder


def go_on(folder: Path, out: Path, start: Path | None = None, **settings: Any) -> Path:
    """Convert again, from the first adapter if no other is given."""
    overrides = {**FIRST, "stages.0.tokens": 0, "stages.1.start": str(start or folder / "first"), **settings}
    linearize.convert(
        folder / "teacher", data=[folder / "text.txt"], out=out, overrides=overrides, adapter_only=True, device="cpu"
    )
    return out


def logits(folder: Path, adapter: Path, **options: Any) -> torch.Tensor:
    """Of a student in adapter form, on text longer than its window."""
    with torch.no_grad():
        return linearize.load(folder / "teacher", adapter=adapter, **options)(text(2, 27) % 40).logits


def test_without_training_it_is_the_earlier_student(folder: Path, tmp_path: Path) -> None:
    again = go_on(folder, tmp_path / "again", **STILL)
    torch.testing.assert_close(logits(folder, again), logits(folder, folder / "first"), rtol=0, atol=1e-5)
    fresh = {**FIRST, "stages.0.tokens": 0, **STILL}
    linearize.convert(
        folder / "teacher", data=[folder / "text.txt"], out=tmp_path / "fresh", overrides=fresh, adapter_only=True,
        device="cpu",
    )  # fmt: skip
    assert (logits(folder, tmp_path / "fresh") - logits(folder, again)).abs().max() > 0.05
    report = json.loads((again / "report.json").read_text())
    assert report["student_loss"] == pytest.approx(
        json.loads((folder / "first" / "report.json").read_text())["student_loss"], abs=1e-4
    )


def test_store_and_heads_may_be_added(folder: Path, tmp_path: Path) -> None:
    new = {"plan.mixer.store": 2, "plan.heads.keep": [[2, 1]]}
    with_both = go_on(folder, tmp_path / "both", **STILL, **new)
    earlier = linearize.load(folder / "teacher", adapter=folder / "first", store=2)
    earlier.keep_heads({2: [1]})
    ids = text(2, 27) % 40
    with torch.no_grad():
        torch.testing.assert_close(logits(folder, with_both), earlier(ids).logits, rtol=0, atol=1e-5)
    assert (logits(folder, with_both) - logits(folder, folder / "first")).abs().max() > 1e-3
    third = go_on(folder, tmp_path / "third", with_both, **STILL, **new)
    torch.testing.assert_close(logits(folder, third), logits(folder, with_both), rtol=0, atol=1e-5)
    more = go_on(folder, tmp_path / "more", with_both, **STILL, **(new | {"plan.heads.keep": [[0, 0], [2, 0], [2, 1]]}))
    earlier.keep_heads({0: [0], 2: [0]})
    with torch.no_grad():
        torch.testing.assert_close(logits(folder, more), earlier(ids).logits, rtol=0, atol=1e-5)
    assert (logits(folder, more) - logits(folder, with_both)).abs().max() > 1e-3
    for heads in ({"plan.heads.keep": [[2, 0]]}, {}):  # others were trained
        with pytest.raises(InputError, match=r"^stages\.1: start"):
            go_on(folder, tmp_path / "fourth", with_both, **STILL, **{"plan.mixer.store": 2, **heads})
    assert not (tmp_path / "fourth").exists()


def test_layers_may_keep_softmax(folder: Path, tmp_path: Path) -> None:
    fewer = go_on(folder, tmp_path / "fewer", **STILL, **{"plan.layers": [2]})
    earlier = load_file(folder / "first" / "mixers.safetensors")
    now = load_file(fewer / "mixers.safetensors")
    assert 0 < len(now) < len(earlier)
    for name, tensor in now.items():
        torch.testing.assert_close(tensor, earlier[name], rtol=0, atol=1e-6)


def test_both_lora_and_mixers_go_on_training(folder: Path, tmp_path: Path) -> None:
    again = go_on(folder, tmp_path / "again", **{"stages.1.tokens": 256, "stages.1.keep_best": False})
    for name in ("mixers.safetensors", "adapter/adapter_model.safetensors"):
        before, after = load_file(folder / "first" / name), load_file(again / name)
        assert before.keys() == after.keys()
        moved = [float((after[key] - value).abs().max()) for key, value in before.items()]
        assert min(moved) > 0 and max(moved) < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"plan.layers": [0, 1]}, {"plan.mixer.window": 8}, {"stages.1.rank": 4}, {"stages.1.alpha": 8},
        {"stages.1.targets": ["q"]}, {"stages.1.start": "."}, {"stages.1.start": "nowhere"}, {"stages.0.tokens": 64},
        {"plan.schedule": {"kind": "progressive", "replaced": [0.5, 1.0]}},
    ],
    ids=lambda settings: next(iter(settings)).rpartition(".")[2],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_before_work(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        go_on(folder, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_another_teachers_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder / "first", other)
    pin = json.loads((other / "linearize_adapter.json").read_text())
    (other / "linearize_adapter.json").write_text(json.dumps({**pin, "fingerprint": "0" * 32}))
    with pytest.raises(InputError, match="weights"):
        go_on(folder, tmp_path / "out", other)


def test_other_tensors_in_its_files_are_refused(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "first", damaged)
    path = damaged / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
    with pytest.raises(InputError, match="shape"):
        go_on(folder, tmp_path / "out", damaged)
