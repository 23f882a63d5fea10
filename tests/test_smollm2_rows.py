"""The rows of the SmolLM2 table, trained and measured at tiny sizes on the packaged teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import smollm2, smollm2_page
from benchmarks.smollm2_measure import RowNumbers
from task_files import write_data

import linearize

TEACHER = str(Path(linearize.__file__).parent / "demo" / "teacher")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window-linear", "window-alone", "window-linear-retrieval", "gdn-hybrid-50"])
def test_a_row_is_trained_in_adapter_form_and_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path)
    story = "Once upon a time, Lily saw a big dog. She was very happy and wanted to play with it in the park. "
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(story * (i % 3 + 8) + f"The end of story {i}." for i in range(40)))
    sizes = ["--tokens", "1536", "--length", "192", "--batch", "2"]  # beyond the window: no student is its teacher
    rows, start = [name], smollm2.ROWS[name].start
    while start is not None:
        rows, start = [start, *rows], (smollm2.ROWS | smollm2.STARTS)[start].start
    for row in rows:
        smollm2.main(["train", row, "--teacher", TEACHER, "--data", str(text), *sizes])
    assert (tmp_path / name / "mixers.safetensors").is_file() or name == "window-alone"
    sizes = ["--lengths", "64", "192", "--loss-tokens", "768", "--limit", "0"]
    smollm2.main(["measure", name, "--teacher", TEACHER, "--text", str(text), *sizes])
    numbers = RowNumbers.model_validate_json((tmp_path / f"{name}.json").read_text("utf-8"))
    losses = numbers.losses[192]
    assert losses.student is not None
    assert losses.student.kl.value > 0 and 0 < losses.student.top1.value <= 1
    assert (losses.window is not None) == name.startswith("window-linear")
    assert [len(text) > 0 for text in numbers.continuations] == [True, True, True]
    trained = {
        "window-linear": [1536, 1536], "window-alone": [1536], "window-linear-retrieval": [1536] * 4,
        "gdn-hybrid-50": [2048, 2048],
    }  # fmt: skip
    assert [stage.tokens for stage in numbers.stages if stage.tokens] == trained[name]
    if name == "window-linear":
        monkeypatch.setenv("LINEARIZE_EVAL_DATA", str(write_data(tmp_path / "items")))
        monkeypatch.setattr("benchmarks.smollm2_measure.TASK_NAMES", ("piqa", "winogrande"))
        sizes = ["--lengths", "--limit", "2"]
        smollm2.main(["measure", "teacher", name, "--teacher", TEACHER, "--text", str(text), *sizes])
        guide = RowNumbers.model_validate_json((tmp_path / "teacher.json").read_text("utf-8"))
        assert guide.tasks["piqa"].items == 2 and not guide.losses
        later = RowNumbers.model_validate_json((tmp_path / f"{name}.json").read_text("utf-8"))
        assert later.losses == numbers.losses and later.provenance == numbers.provenance
        assert later.tasks_provenance is not None and later.tasks["piqa"].items == 2
    monkeypatch.setattr(smollm2_page, "LENGTHS", (192,))
    shown = smollm2_page.page(smollm2_page.measured(tmp_path))
    assert f"| {losses.student.kl.value:.3f} |" in shown
    assert shown.count("not measured") > len(smollm2.ROWS)
