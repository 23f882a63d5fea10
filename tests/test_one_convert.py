"""One function converts, and an option means the same on the command line and in Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file
from teacher_folder import write_teacher, write_text

import linearize
from linearize.cli.main import main
from linearize.errors import InputError
from linearize.training import tracking

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "description": "Block by block.",
    "source": "A test.",
    "plan": {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 3}},
    "data": {"length": 40, "heldout": 0.2},
    "stages": [
        {"name": "attention_transfer", "tokens": 480, "lr": 1e-2, "batch": 3, "evaluate_every": 0.5, "block": 2}
    ],
}
STREAM = [False, True]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of five layers (three blocks), text and a recipe without later stages."""
    path = tmp_path_factory.mktemp("one")
    write_teacher(path / "teacher", num_hidden_layers=5, shard="40KB")
    write_text(path / "text.txt")
    (path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_stages", "plot_layer_error"):
        monkeypatch.setattr(f"linearize.conversion.outputs.{name}", lambda *_: [])


def python(folder: Path, out: Path, **options: Any) -> Any:
    arguments = {"data": [folder / "text.txt"], "recipe": str(folder / "tiny.yaml"), "device": "cpu", "out": out}
    return linearize.convert(folder / "teacher", **{**arguments, **options})


def command(folder: Path, out: Path, *options: str) -> int:
    arguments = ["--data", str(folder / "text.txt"), "--recipe", str(folder / "tiny.yaml"), "--device", "cpu"]
    return main(["convert", str(folder / "teacher"), *arguments, "--out", str(out), *options])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(out.glob("*.safetensors")) for name, value in load_file(path).items()}


def parts(out: Path) -> list[str]:
    folder = out.parent / f".{out.name}.run" / "0-attention_transfer" / "results"
    return sorted(path.name for path in folder.glob("*.safetensors"))


class Recorder:
    """A tracker that records its calls, in place of tensorboard's."""

    stages: ClassVar[list[str]] = []

    def __init__(self, folder: Path) -> None:
        """Keeps nothing of the folder."""

    def begin(self, stage: str, step: int | None) -> None:
        """A stage starts."""
        self.stages.append(stage)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers."""

    def end(self) -> None:
        """The end."""


@pytest.mark.parametrize("stream", STREAM)
def test_blocks_keep_every_other_option(
    stream: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, more = tmp_path / "out", ["--stream"] * stream
    Recorder.stages = []
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Recorder)
    out.mkdir()
    assert command(folder, out, "--blocks", "1", *more) == 2
    assert "--overwrite" in capsys.readouterr().err and not parts(out)
    assert command(folder, out, "--blocks", "1", "--overwrite", "--track", "nobody", *more) == 2
    assert "nobody" in capsys.readouterr().err and not parts(out)
    assert command(folder, out, "--blocks", "1", "--overwrite", "--track", "tensorboard", *more) == 0
    assert parts(out) == ["layers-002-003.safetensors"] and out.is_dir() and not list(out.iterdir())
    assert Recorder.stages == ["0-attention_transfer/layers-002-003"]


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAM)
def test_some_blocks_are_not_a_student(stream: bool, folder: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert python(folder, one, blocks="0", stream=stream) is None
    assert parts(one) == ["layers-000-001.safetensors"] and not one.exists()
    assert python(folder, one, blocks="0-1,2", stream=stream) is None
    assert len(parts(one)) == 3 and not one.exists()
    python(folder, one, stream=stream)
    python(folder, other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in second.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / ".one.run").exists()


@pytest.mark.parametrize("wrong", [object(), 0, ["0"], "0;1", ""])
def test_blocks_are_a_selection_in_text(wrong: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0-3,7"):
        python(folder, tmp_path / "out", blocks=wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_streamed_from_python_as_from_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither ever has the whole model in memory, and both write the same weights."""
    with monkeypatch.context() as patch:
        for name in ("prepare", "load"):
            patch.setattr(f"linearize.conversion.api.{name}", lambda *_, **__: pytest.fail("the whole model is loaded"))
        assert command(folder, tmp_path / "command", "--stream") == 0
        assert python(folder, tmp_path / "python", stream=True) is None
    first, second = weights(tmp_path / "command"), weights(tmp_path / "python")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert linearize.load(tmp_path / "python")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("stream", STREAM)
def test_bounds_are_arguments(stream: bool, folder: Path, tmp_path: Path) -> None:
    for options, says in ({"memory": "1kB"}, "even block 1 needs"), ({"disk": 20_000}, "even one block"):
        with pytest.raises(InputError, match=says):
            python(folder, tmp_path / "out", overrides={"stages.0.block": "auto"}, stream=stream, **options)
    with pytest.raises(InputError, match="no size"):
        python(folder, tmp_path / "out", memory="much", stream=stream)
    assert not list(tmp_path.iterdir())
