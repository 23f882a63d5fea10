"""The rows of the SmolLM2 table, trained and measured at tiny sizes on the packaged teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import smollm2

import linearize

TEACHER = str(Path(linearize.__file__).parent / "demo" / "teacher")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window-linear", "window-alone", "gdn-hybrid-50"])
def test_a_row_is_trained_in_adapter_form_and_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path)
    story = "Once upon a time, Lily saw a big dog. She was very happy and wanted to play with it in the park. "
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(story * (i % 3 + 2) + f"The end of story {i}." for i in range(40)))
    sizes = ["--tokens", "512", "--length", "64", "--batch", "2"]
    smollm2.main(["train", name, "--teacher", TEACHER, "--data", str(text), *sizes])
    assert (tmp_path / name / "mixers.safetensors").is_file() or name == "window-alone"
    sizes = ["--lengths", "48", "64", "--loss-tokens", "256", "--recall", "--limit", "0"]
    smollm2.main(["measure", name, "--teacher", TEACHER, "--text", str(text), *sizes])
    numbers = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    student = numbers["loss at 64"]["student"]
    assert student["kl"][0] > 0 and 0 < student["top1"][0] <= 1
    assert ("window" in numbers["loss at 64"]) == (name == "window-linear")
    capsys.readouterr()
    smollm2.main(["table"])
    assert capsys.readouterr().out.count("\n") == 3
