"""`linearize convert` with a block-wise first stage: models in memory, or weights read layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from teacher_folder import write_teacher, write_text

import linearize
from linearize.conversion.request import parse_blocks
from linearize.errors import InputError
from linearize.recipes.schema import Recipe

LAYERS = 5
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "plan": {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 3}, "layers": [0, 2, 3, 4]},
    "data": {"length": 40, "heldout": 0.2},
    "stages": [{"name": "attention_transfer", "tokens": 480, "lr": 1e-2, "batch": 3, "evaluate_every": 0.5}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blockwise")
    write_teacher(path / "teacher", num_hidden_layers=LAYERS, shard="40KB")
    write_text(path / "text.txt")
    return path


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_stages", "plot_layer_error"):
        monkeypatch.setattr(f"linearize.conversion.outputs.{name}", lambda *_: [])


def arguments(folder: Path, out: Path, **overrides: Any) -> dict[str, Any]:
    settings = {f"stages.0.{key}": value for key, value in overrides.items()}
    recipe = Recipe.from_data(RECIPE).override(settings)
    return {"data": [folder / "text.txt"], "recipe": recipe, "device": "cpu", "out": out}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(out.glob("*.safetensors")) for name, value in load_file(path).items()}


def report(out: Path) -> dict[str, Any]:
    result = json.loads((out / "report.json").read_text())
    result.pop("provenance")
    for stage in result["stages"]:
        stage.pop("seconds")
        stage["details"].pop("metrics", None)
    return result


@pytest.fixture(scope="module")
def joint(folder: Path) -> Path:
    linearize.convert(folder / "teacher", **arguments(folder, folder / "joint"))
    return folder / "joint"


def test_one_block_gives_the_joint_student_and_report(folder: Path, joint: Path, tmp_path: Path) -> None:
    linearize.convert(folder / "teacher", **arguments(folder, tmp_path / "out", block=LAYERS))
    expected, actual = weights(joint), weights(tmp_path / "out")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert report(tmp_path / "out") == report(joint)
    assert not (tmp_path / ".out.run").exists()


@pytest.mark.slow
def test_some_blocks_here_and_the_others_there(folder: Path, tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    linearize.convert(folder / "teacher", **arguments(folder, whole, block=2))
    for blocks in ("2", "0-1"):
        linearize.convert(folder / "teacher", blocks=blocks, **arguments(folder, shared, block=2))
        assert not shared.exists()
    parts = sorted(path.name for path in (tmp_path / ".shared.run" / "0-attention_transfer" / "results").iterdir())
    assert parts == [f"layers-{a:03d}-{b:03d}.safetensors" for a, b in ((0, 1), (2, 3), (4, 4))]
    linearize.convert(folder / "teacher", **arguments(folder, shared, block=2))
    expected, actual = weights(whole), weights(shared)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert report(shared) == report(whole)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({}, {"memory": 10**9}, "no|none: set stages.0.block=auto"),
        ({"block": 9}, {"disk": 20_000}, "even one block of all 5 layers needs 115 kB of disk"),
        ({"block": 1}, {"disk": 240_000}, "3 to 5 would fit"),
        ({"block": "auto"}, {"memory": 1000}, "even block 1 needs"),
        ({"block": 2}, {"blocks": "7"}, "in blocks 0 to 2"),
        ({"block": 2}, {"blocks": "3-1"}, "write numbers and ranges"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    common = arguments(folder, tmp_path / "out", **change)
    with pytest.raises(InputError, match=says):
        linearize.convert(folder / "teacher", **common, **options)
    assert not (tmp_path / "out").exists()


def test_blocks_as_people_write_them() -> None:
    assert parse_blocks("0-3, 7,5-5") == [0, 1, 2, 3, 5, 7]
    for wrong in ("", "a", "1-", "-1", "2-1", "1,,2"):
        with pytest.raises(InputError, match="write numbers"):
            parse_blocks(wrong)


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mixer"),
    [
        ("llama", {"name": "lolcats", "window": 4, "feature_dim": 3}),
        ("gpt2", {"name": "lolcats", "window": 4, "feature_dim": 3}),
        ("mixtral", {"name": "gated_delta_net", "initialise": "calibrate"}),
    ],
)
def test_streamed_conversion_is_the_one_in_memory(family: str, mixer: dict[str, Any], tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True} if family == "gpt2" else {}
    write_teacher(tmp_path / "teacher", family, num_hidden_layers=LAYERS, shard="40KB", **tied)
    write_text(tmp_path / "text.txt")
    name = "attention_transfer" if mixer["name"] == "lolcats" else "hidden_alignment"
    recipe = Recipe.from_data(
        {**RECIPE, "plan": {**RECIPE["plan"], "mixer": mixer}, "stages": [{**RECIPE["stages"][0], "name": name}]}
    ).override({"stages.0.block": 2})
    one, other = tmp_path / "memory", tmp_path / "streamed"
    options = {"data": [tmp_path / "text.txt"], "recipe": recipe, "device": "cpu"}
    linearize.convert(tmp_path / "teacher", out=one, **options)
    linearize.convert(tmp_path / "teacher", out=other, stream=True, **options)
    expected, actual = weights(one), weights(other)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
        assert ".mixer." in key or torch.equal(actual[key], value)
    assert config_of(other) == config_of(one)
    first, second = report(one), report(other)
    for key in ("teacher_loss", "swap_loss", "student_loss", "student_kl", "student_top1"):
        assert second[key] == pytest.approx(first[key], rel=1e-4, abs=1e-5), key
    assert second["layer_error"].keys() == first["layer_error"].keys()
    for moment, errors in first["layer_error"].items():
        assert second["layer_error"][moment] == pytest.approx(errors, rel=1e-3)
    assert (second["ablation"] is None) == (first["ablation"] is None)
    if first["ablation"] is not None:
        both = [{k: v for k, v in each["ablation"]["all_tokens"].items() if v is not None} for each in (first, second)]
        assert both[1] == pytest.approx(both[0], rel=1e-3)
    assert sorted(p.name for p in other.iterdir()) == sorted(p.name for p in one.iterdir())
    assert linearize.load(other)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
