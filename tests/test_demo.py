"""`linearize demo`, with the embedded teacher and everything else cut down to seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.kills import differences

import linearize.demo.run as run
import linearize.demo.text as text
from linearize.cli.main import main
from linearize.errors import InputError
from linearize.evaluation import read_report
from linearize.modeling import load
from linearize.recipes import DEFAULT_RECIPE, load_recipe

SMALL: dict[Any, dict[str, Any]] = {
    text: {
        "STORY_TOKENS": 500, "STORY_BATCH": 12, "LONGEST_STORY": 50, "RECALL_DOCUMENTS": 14, "WORDS": (20, 30),
        "FACTS": (1, 2), "QUESTIONS": (1, 2), "ASKED_AFTER_WORDS": (50, 80), "ASKED_PER_DISTANCE": 2,
    },
    run: {"TOKENS": 4096, "CONTEXTS": (17, 70), "NEW_TOKENS": 5},
}  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One small demo: its folder, its exit code and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for module, constants in SMALL.items():
            for name, value in constants.items():
                patch.setattr(module, name, value)
        patch.chdir(folder)
        with (folder / "out.txt").open("w") as out:
            patch.setattr("sys.stdout", out)
            code = main(["demo"])
    return SimpleNamespace(code=code, folder=folder / "linearize-demo", printed=(folder / "out.txt").read_text())


def test_the_tables_show_what_was_measured(demo: SimpleNamespace) -> None:
    assert demo.code == 0
    report = read_report(demo.folder / "student")
    assert report is not None
    losses = [report.teacher_loss, report.swap_loss, *(stage.loss_after for stage in report.stages)]
    assert len(losses) == 2 + len(load_recipe(DEFAULT_RECIPE).stages)
    for loss in losses:
        assert f"{loss:.4f}" in demo.printed
    numbers = json.loads((demo.folder / "demo.json").read_text())
    for name in ("teacher", "student"):
        assert f"{numbers['recall'][name]['accuracy']:.0%}" in demo.printed
        assert numbers["recall"][name]["items"] == 4
        assert all(answer["distance"] > numbers["window"] for answer in numbers["recall"][name]["answers"])
        assert re.search(rf"\n{name} +{run.PROMPT[:20]}", demo.printed)
        assert [c["context"] for c in numbers["decode_cost"] if c["model"] == name] == [17, 70]
    assert numbers["report"]["provenance"]["commit"] == numbers["provenance"]["commit"]
    assert str(Path("linearize-demo") / "plots") in demo.printed


def test_the_folder_is_complete_and_moves(demo: SimpleNamespace) -> None:
    names = {path.stem for path in (demo.folder / "plots").glob("*.png")}
    assert names == {"stages", "loss_by_position", "recall", "decode_cost"}
    assert sorted(path.name for path in demo.folder.iterdir()) == ["demo.json", "plots", "student", "text"]
    assert [path.name for path in demo.folder.parent.iterdir() if path.name.startswith(".")] == []
    student = load(demo.folder / "student")
    assert sum(mixer is not None for mixer in student.config.plan) == len(student.config.plan) > 1
    report = read_report(demo.folder / "student")
    assert report is not None and report.data == ["text/stories.jsonl", "text/recall.jsonl"]


@pytest.mark.slow
def test_stopped_half_way_the_next_demo_goes_on(
    demo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def not_again(*_: Any, **__: Any) -> None:
        raise AssertionError("what was done is done again")

    for module, constants in SMALL.items():
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run, "convert", stop)
        assert main(["demo"]) == 130
    with monkeypatch.context() as patch:
        patch.setattr("linearize.training.data.sampling.write", not_again)
        patch.setattr(run, "recall_beyond_window", stop)
        assert main(["demo"]) == 130
    assert [path.name for path in tmp_path.iterdir()] == [".linearize-demo.run"]
    monkeypatch.setattr(run, "convert", not_again)
    assert main(["demo"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["linearize-demo"]
    assert sorted(path.name for path in (tmp_path / "linearize-demo" / "text").iterdir()) == [
        "recall.jsonl", "stories.jsonl",
    ]  # fmt: skip
    assert differences(demo.folder / "student", tmp_path / "linearize-demo" / "student") == []


def test_training_text_holds_no_question_that_is_asked(demo: SimpleNamespace) -> None:
    rows = [json.loads(line)["text"] for line in (demo.folder / "text" / "recall.jsonl").read_text().splitlines()]
    assert len(rows) == 14 and all("What is the code of the" in row for row in rows)
    numbers = json.loads((demo.folder / "demo.json").read_text())
    codes = {answer["expected"] for answer in numbers["recall"]["student"]["answers"]}
    assert codes and not any(f" {code}." in row for row in rows for code in codes)


def test_questions_have_the_asked_distances_and_one_answer() -> None:
    hay = ["The cat sat on a mat. It was warm. Then it ran home to eat.", "A dog saw a bird. It sang. They played."]
    items = text.recall_questions(hay, 3)
    assert len(items) == text.ASKED_PER_DISTANCE * len(text.ASKED_AFTER_WORDS)
    for item, words in zip(items, sorted(text.ASKED_AFTER_WORDS * text.ASKED_PER_DISTANCE), strict=True):
        assert abs(item.distance - words) < 40 and item.prompt.count(item.answer) == 1
    assert text.recall_questions(hay, 3) == items != text.recall_questions(hay, 4)


def test_the_recipe_is_the_default_one_cut_down() -> None:
    full, small = load_recipe(DEFAULT_RECIPE), run.demo_recipe()
    assert small.plan.mixer.window == run.WINDOW and small.plan.mixer.feature_map == full.plan.mixer.feature_map  # type: ignore[union-attr]
    assert [stage.name for stage in small.stages] == [stage.name for stage in full.stages]
    assert sum(stage.tokens for stage in small.stages) == pytest.approx(run.TOKENS, abs=len(full.stages))
    assert run.reach(small) < min(text.ASKED_AFTER_WORDS), "every question must lie beyond the window"
    assert small.data.length <= 1024


def test_an_earlier_demo_is_replaced_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_run", stop)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an earlier demo"):
        run.run_demo(out=tmp_path / "mine")
    (tmp_path / "mine" / "demo.json").write_text("{}")  # now it looks like one, and is kept until the new one is done
    capsys.readouterr()
    assert main(["demo", "--out", str(tmp_path / "mine")]) == 130
    assert capsys.readouterr().err == "linearize: interrupted\n"
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"mine", ".mine.run"}
    monkeypatch.setattr(run, "_run", lambda folder, console: (folder / "new").touch())
    monkeypatch.setattr(run, "_write", lambda result, folder: None)
    monkeypatch.setattr(run, "show_demo", lambda *_: None)
    run.run_demo(out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["new"]
