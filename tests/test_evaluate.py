"""`evaluate`: models, text that training never saw, sections, the report on disk, an interruption."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_evaluation_outputs import some_report, tiny_llama, tiny_tokenizer
from torch import nn

from linearize.cli.main import main
from linearize.cli.options import each_with_its_option
from linearize.errors import InputError
from linearize.evaluation import (
    SUITES,
    EvalReport,
    EvaluationOptions,
    bench,
    evaluate,
    held_out_report,
    loss_only,
    print_report,
    write_report,
)
from linearize.evaluation.loading import Origin, held_out_documents, unique_names
from linearize.evaluation.sections.branches import Branches
from linearize.evaluation.sections.cloze.measure import Cloze
from linearize.evaluation.sections.language import Language
from linearize.evaluation.sections.speed import Speed
from linearize.evaluation.suites import Suite
from linearize.metrics.branches import window_reach
from linearize.mixers.gla import GlaConfig
from linearize.mixers.lolcats import LolcatsConfig
from linearize.mixers.mamba2 import Mamba2Config
from linearize.mixers.sliding_window import SlidingWindowConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.training.data.loading import DataConfig, document_rows, load_documents, split

CPU = EvaluationOptions(device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one` and `two` (random models of one vocabulary), `other` (another vocabulary), `student` (of `one`,
    made from `text.txt`) and `text.txt`."""
    path = tmp_path_factory.mktemp("evaluate")
    for name, seed, extra in (("one", 1, ""), ("two", 2, ""), ("other", 3, "-")):
        tokenizer = tiny_tokenizer(extra)
        tokenizer.save_pretrained(path / name)
        tiny_llama(seed, vocabulary=len(tokenizer)).save_pretrained(path / name)
    stories = [f"Story {i}: {'the cat sat. ' * (i % 4 + 1)}The end of {i * 37}." for i in range(12)]
    (path / "text.txt").write_text("\n\n".join(stories))
    make_student(path, "student")
    return path


def make_student(folder: Path, name: str, **report: Any) -> LinearizedForCausalLM:
    """A student of `one` whose mixers are random, with a report and a recipe."""
    plan = [LolcatsConfig(window=3, feature_dim=5), None, LolcatsConfig(window=3, feature_dim=5)]
    student = LinearizedForCausalLM.from_teacher(tiny_llama(1), plan)
    for parameter in student.mixer_parameters().values():
        nn.init.normal_(parameter)
    student.save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    settings = {"teacher": str(folder / "one"), "data": [str(folder / "text.txt")], **report}
    write_report(some_report(**settings), folder / name)
    (folder / name / "recipe.yaml").write_text("data:\n  length: 50\n  heldout: 4\n")
    return student.eval()


def test_two_models_on_the_same_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [str(folder / "text.txt")]
    alone = evaluate(folder / "one", data=data, options=CPU)
    options = EvaluationOptions(device="cpu", length=40)
    result = evaluate(folder / "two", teacher=folder / "one", data=data, out=tmp_path / "out", options=options)
    rows = document_rows(load_documents(data, tiny_tokenizer()), 64)
    expected = held_out_report(None, tiny_llama(1), rows.in_order(5))
    assert alone.teacher_loss == pytest.approx(expected.teacher_loss, abs=1e-6)
    assert "student_loss" not in alone.to_json() and [model.role for model in alone.contestants] == ["teacher"]
    assert alone.tokens == expected.tokens > result.tokens  # a token less for each cut
    assert result.length == 40 and result.student_kl > 0
    assert result.gap == pytest.approx(result.student_loss - result.teacher_loss, abs=1e-9)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result.to_json()
    assert EvalReport.read(tmp_path / "out") == result
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()
    names = {path.stem for path in (tmp_path / "out" / "plots").iterdir()}
    assert names and all(
        (tmp_path / "out" / "plots" / f"{name}.{kind}").is_file() for name in names for kind in ("svg", "png")
    )
    print_report(result)
    printed = capsys.readouterr().out
    assert f"{result.gap:.2f}" in printed and "\x1b" not in printed
    assert not set(printed) & set("│┃━─┏╭")
    assert not list(tmp_path.glob(".out*"))


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    data = [str(folder / "text.txt")]
    with pytest.raises(InputError, match="--data"):
        evaluate(folder / "one", options=CPU)
    with pytest.raises(InputError, match="not a model folder"):
        evaluate(folder / "none", options=CPU)
    with pytest.raises(InputError, match="vocabulary"):
        evaluate(folder / "one", teacher=folder / "other", data=data, options=CPU)
    with pytest.raises(InputError, match="limit 0"):
        evaluate(folder / "one", data=data, options=EvaluationOptions(limit=0))
    with pytest.raises(InputError, match=r"none\.txt"):
        evaluate(folder / "one", data=[str(folder / "none.txt")], options=CPU)
    with pytest.raises(InputError, match="did you mean 'lolcats'"):
        evaluate(folder / "one", data=data, suite="lolcat", options=CPU)
    with pytest.raises(InputError, match=r"own report\.json would be lost"):
        evaluate(folder / "student", out=folder / "student", options=CPU)
    with pytest.raises(InputError, match="--judge-model"):
        evaluate(folder / "one", data=data, options=EvaluationOptions(judge_url="http://127.0.0.1:1"))
    with pytest.raises(InputError, match="--compare"):
        evaluate(data=data)
    with pytest.raises(InputError, match="contexts"):
        bench(folder / "one", contexts=(0,))
    few = evaluate(folder / "one", data=data, options=EvaluationOptions(device="cpu", tokens=150))
    assert few.documents < 12 and few.tokens <= 150 and "at most 150 tokens" in few.notes[0]
    two = evaluate(folder / "one", data=data, options=EvaluationOptions(device="cpu", limit=2))
    assert two.documents == 2 and "at most 2 documents" in two.notes[0]


def test_a_student_by_its_folder_alone(folder: Path, tmp_path: Path) -> None:
    """The folder names teacher and data; each branch is what the student gives when asked for it."""
    result = evaluate(folder / "student", out=tmp_path / "out", options=CPU)
    heldout = split(load_documents([str(folder / "text.txt")], tiny_tokenizer()), DataConfig(length=50, heldout=4))
    rows = document_rows(heldout.heldout, 50)
    student = LinearizedForCausalLM.from_pretrained(folder / "student").eval()
    assert result.tokens == rows.num_targets and [model.name for model in result.contestants] == ["teacher", "student"]
    assert result.contestants[1].mixers == ["lolcats", "softmax", "lolcats"]
    expected = held_out_report(student, tiny_llama(1), rows.in_order(3))
    assert result.student_loss == pytest.approx(expected.student_loss, abs=1e-5)
    assert result.student_kl == pytest.approx(expected.student_kl, abs=1e-5)
    for branch in ("both", "window", "linear"):
        loss = loss_only(student, rows.in_order(3), branch)[0]
        assert any(abs(number - loss) < 1e-5 for number in numbers_in(result.sections["branches"])), branch


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers_in(entry)]
    if isinstance(value, list):
        return [number for entry in value for number in numbers_in(entry)]
    return [value] if isinstance(value, float) else []


def test_several_students_in_one_report(folder: Path, tmp_path: Path) -> None:
    make_student(folder, "second")
    result = evaluate(folder / "student", compare=[folder / "second", folder / "two"], options=CPU)
    assert [model.name for model in result.contestants] == ["teacher", "student", "second", "two"]
    assert set(result.verdict.students) == {"student", "second", "two"}
    models = result.sections["language"]["models"]
    assert models["two"]["loss"] != models["student"]["loss"] == models["second"]["loss"]  # equal seeds, equal mixers
    make_student(folder, "stranger", teacher="elsewhere")
    with pytest.raises(InputError, match="different teachers"):
        evaluate(compare=[folder / "student", folder / "stranger"], options=CPU)


def test_names_are_short_and_unique(tmp_path: Path) -> None:
    assert unique_names(["a/student", "b/student", "hub/teacher", "c/student/"]) == [
        "student", "student-2", "teacher-2", "student-3",
    ]  # fmt: skip


def test_an_interrupted_run_continues(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before the interruption is not measured again, unless an option that it depends on changes."""
    out, runs = tmp_path / "out", []
    measure, ablate = Language.run, Branches.run

    def counted(self: Language, ctx: Any) -> Any:
        runs.append("language")
        return measure(self, ctx)

    def stopped(self: Branches, ctx: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Language, "run", counted)
    monkeypatch.setattr(Branches, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder / "student", out=out, options=CPU)
    assert runs == ["language"] and not (out / "report.json").exists() and (tmp_path / ".out.run").is_dir()
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder / "student", out=out, options=EvaluationOptions(device="cpu", seed=1))
    assert len(runs) == 2
    monkeypatch.setattr(Branches, "run", ablate)
    resumed = evaluate(folder / "student", out=out, options=CPU)
    assert len(runs) == 2 and not (tmp_path / ".out.run").exists()
    whole = evaluate(folder / "student", out=tmp_path / "other", options=CPU)
    assert resumed.sections == whole.sections and len(runs) == 3


@pytest.mark.slow
def test_a_second_run_gives_the_same_report(folder: Path, tmp_path: Path) -> None:
    first, second = (evaluate(folder / "student", out=tmp_path / name, options=CPU).to_json() for name in ("a", "b"))
    same = {key: value for key, value in first.items() if key not in ("provenance", "seconds")}
    assert same == {key: second[key] for key in same}
    pages = [(tmp_path / name / "report.html").read_text() for name in ("a", "b")]
    drawn = [re.findall(r"<img[^>]*>", page) for page in pages]
    assert drawn[0] == drawn[1] and drawn[0]


def test_only_text_that_training_never_saw(folder: Path, tmp_path: Path) -> None:
    """The data of the conversion gives its held-out part; part of it in other company is refused."""
    spec, tokenizer = str(folder / "text.txt"), tiny_tokenizer()
    origin, notes = Origin.read(folder / "student"), []
    documents = held_out_documents([spec], [origin], tokenizer, None, notes)
    parts = split(load_documents([spec], tokenizer), DataConfig(length=50, heldout=4))
    assert documents == parts.heldout and len(documents) == 4 and "held-out part" in notes[0]
    make_student(folder, "more", data=[spec, "more.txt"])
    with pytest.raises(InputError, match="trained on it"):
        held_out_documents([spec], [origin, Origin.read(folder / "more")], tokenizer, None, notes)
    (folder / "second-split").mkdir(exist_ok=True)
    make_student(folder, "second-split")
    (folder / "second-split" / "recipe.yaml").write_text("data:\n  length: 16\n  heldout: 3\n")
    with pytest.raises(InputError, match="different parts"):
        held_out_documents([spec], [origin, Origin.read(folder / "second-split")], tokenizer, None, notes)
    (folder / "second-split" / "recipe.yaml").write_text("data:\n  length: 16\n  heldout: 4\n  measured_tokens: 77\n")
    assert (
        held_out_documents([spec], [origin, Origin.read(folder / "second-split")], tokenizer, None, notes) == documents
    )
    other = tmp_path / "other.txt"
    other.write_text("A new story.\n\nAnd one more.")
    assert len(held_out_documents([str(other)], [origin], tokenizer, None, notes)) == 2


def test_a_report_names_its_data_beside_the_student(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "stories.txt").write_text((folder / "text.txt").read_text())
    tiny_llama(1).save_pretrained(tmp_path / "one")
    tiny_tokenizer().save_pretrained(tmp_path / "one")
    make_student(tmp_path, "student", data=["text/stories.txt"])
    here = evaluate(tmp_path / "student", options=CPU)
    assert here.student_loss == evaluate(folder / "student", options=CPU).student_loss


def test_a_suite_without_text_measures_what_needs_none(folder: Path) -> None:
    fast = Speed(contexts=(24,), repeats=1, new_tokens=2, prefill_repeats=1, most_rows=0, check_tokens=20)
    result = evaluate(folder / "one", sections=[Language(), fast], options=CPU)
    assert list(result.sections) == ["speed"] and "no held-out text" in result.notes[0]


def test_a_suite_on_little_text_measures_what_it_can(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = (Language(), Cloze())
    monkeypatch.setitem(SUITES, "some", Suite(description="some", sections=sections))
    monkeypatch.setitem(SUITES, "cloze", Suite(description="cloze", sections=sections[1:]))
    result = evaluate(folder / "student", suite="some", options=CPU)
    assert list(result.sections) == ["language"] and any(f"{Cloze.TITLE} (cloze: 0 items" in n for n in result.notes)
    for options in ({"sections": sections}, {"suite": "cloze"}):
        with pytest.raises(InputError, match="0 items"):
            evaluate(folder / "student", options=CPU, **options)  # type: ignore[arg-type]


def test_bench_is_the_section_speed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "bench",
        str(folder / "student"),
        "--context",
        "24,40",
        "--batch",
        "1",
        "--repeats",
        "1",
        "--new-tokens",
        "2",
    ]
    assert main([*argv, "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["documents"] == 0 and not result["notes"]
    points = result["sections"]["speed"]["points"]
    assert {(p["model"], p["context"]) for p in points} == {(m, c) for m in ("teacher", "student") for c in (24, 40)}


def test_every_suite_can_be_described_and_stored() -> None:
    for name, suite in SUITES.items():
        assert suite.description and suite.sections, name
        assert len({section.NAME for section in suite.sections}) == len(suite.sections)
        yaml.safe_dump([section.model_dump(mode="json") for section in suite.sections + suite.offline_tasks])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "--compare", "a", "b", "--limit", "3"], ["eval", "--compare", "a", "--compare", "b", "--limit", "3"]),
        (["eval", "x", "--compare", "a"], ["eval", "x", "--compare", "a"]),
        (["--compare", "a", "--compare", "b", "c"], ["--compare", "a", "--compare", "b", "--compare", "c"]),
    ],
)  # fmt: skip
def test_compare_takes_several_values(arguments: list[str], expected: list[str]) -> None:
    assert each_with_its_option(arguments, "--compare") == expected


@pytest.mark.parametrize("arguments", [["eval", "--compare", "--json"], ["eval", "x", "--compare"]])
def test_compare_without_a_value(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == "linearize: --compare without a value: give one or more after it\n"


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([LolcatsConfig(window=5, feature_dim=3)], 10),  # terraced: the block before and the own one
        ([LolcatsConfig(window=5, feature_dim=3, window_shape="sliding")], 5),
        ([LolcatsConfig(window=0, feature_dim=3), None], None),
        ([SlidingWindowConfig(window=7), None], None),
        ([SlidingWindowConfig(window=7), LolcatsConfig(window=3, feature_dim=3)], 7),
        ([GlaConfig(window=9, window_shape="sliding"), None], 9),
        ([LolcatsConfig(window=5, feature_dim=3), Mamba2Config()], None),  # Mamba-2 has no branch to run alone
        ([None, None], None),
    ],
)
def test_which_plans_have_two_branches(configs: list[Any], expected: int | None) -> None:
    assert window_reach(configs) == expected
