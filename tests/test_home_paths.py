"""`~` in every path that the command line and Python take: data, models, recipes, outputs, tables, templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_evaluation_outputs import some_report, tiny_llama, tiny_tokenizer
from torch import nn

import linearize
from linearize.cli.main import main
from linearize.conversion.inspections import inspect_sensitivity
from linearize.conversion.request import read_request
from linearize.decoding.generate import generate_text
from linearize.decoding.loading import is_student, load_any
from linearize.evaluation import EvaluationOptions, evaluate, write_report
from linearize.evaluation.sections.language import Language
from linearize.metrics.report import read_report
from linearize.mixers.lolcats import LolcatsConfig
from linearize.modeling.export import export_student
from linearize.modeling.inspect import inspect_model
from linearize.modeling.io.teacher import load_teacher, load_tokenizer
from linearize.planning.samples import read_config
from linearize.storage.files import expand_home
from linearize.training.data.chat import template_text
from linearize.training.data.loading import load_documents
from linearize.training.stages.external_teacher import check_vocabulary
from linearize.training.stages.sft import SftConfig

CPU = EvaluationOptions(device="cpu")
FEW = [
    "--set", "plan.mixer.window=4", "--set", "data.heldout=3", "--set", "stages.0.batch=2",
    "--set", "stages.0.tokens=128", "--set", "stages.1.tokens=0", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with `teacher`, `student`, `text.txt`, `own.yaml` (on top of `base.yaml`) and `devices.yaml`."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = tiny_tokenizer()
    tiny_llama(1).save_pretrained(home / "teacher")
    tokenizer.save_pretrained(home / "teacher")
    student = linearize.LinearizedForCausalLM.from_teacher(
        tiny_llama(1), [LolcatsConfig(window=3, feature_dim=5), None, LolcatsConfig(window=3, feature_dim=5)]
    )
    for parameter in student.mixer_parameters().values():
        nn.init.normal_(parameter)
    student.save_pretrained(home / "student")
    tokenizer.save_pretrained(home / "student")
    stories = [f"Story {i}: {'the cat sat. ' * (i % 5 + 1)}The end of {i * 37}." for i in range(40)]
    (home / "text.txt").write_text("\n\n".join(stories))
    (home / "rows.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 3))
    (home / "base.yaml").write_text("base: window-linear\nset: {plan.mixer.window: 4}\n")
    (home / "own.yaml").write_text("base: ~/base.yaml\nset: {data.heldout: 3}\n")
    (home / "template.jinja").write_text("{{ messages }}")
    (home / "tasks").mkdir()
    return home


@pytest.fixture
def home(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(filled))
    monkeypatch.chdir(filled / "tasks")  # or a folder called `~` could be made unnoticed
    return filled


def test_the_helper_leaves_everything_else_as_it_is(home: Path) -> None:
    assert expand_home("~/a b") == f"{home}/a b" and expand_home(Path("~/a")) == f"{home}/a"
    for name in ("owner/name", "self", "./~/x", "a~", "~nobody-has-this-name/x", "~backup.txt", ""):
        assert expand_home(name) == name


def test_a_conversion_is_asked_for_by_whole_paths(home: Path) -> None:
    request = read_request(
        "~/teacher", data=["~/text.txt", "pseudo:~/rows.json", "self", "owner/name"], out="~/new", recipe="~/own.yaml",
        overrides=None, blocks=None, stream=False, memory=None, disk=None, overwrite=False, device=None,
        trust_remote_code=False, adapter_only=False,
    )  # fmt: skip
    assert request.teacher == str(home / "teacher") and request.final == home / "new"
    assert request.specs == [str(home / "text.txt"), f"pseudo:{home / 'rows.json'}", "self", "owner/name"]
    assert request.recipe.plan.mixer.window == 4 and request.recipe.data.heldout == 3  # type: ignore[union-attr]


CALLS: dict[str, Callable[[], Any]] = {
    "load": lambda: linearize.load("~/student"),
    "load_recipe": lambda: linearize.load_recipe("~/own.yaml"),
    "load_recipe of a Path": lambda: linearize.load_recipe(Path("~/own.yaml")),
    "load_teacher": lambda: load_teacher("~/teacher"),
    "load_tokenizer": lambda: load_tokenizer("~/teacher"),
    "load_any": lambda: load_any("~/student", device="cpu"),
    "is_student": lambda: is_student("~/student"),
    "generate": lambda: generate_text(
        "~/student", "a", draft="~/student", max_new_tokens=2, device="cpu", stream=False
    ),
    "inspect": lambda: inspect_model("~/student"),
    "sensitivity": lambda: inspect_sensitivity("~/teacher", data=["~/text.txt"], recipe="~/own.yaml", device="cpu"),
    "plan": lambda: read_config("~/teacher"),
    "documents": lambda: load_documents(["~/text.txt"], tiny_tokenizer()),
    "sft": lambda: SftConfig(data="~/rows.json").rows(tiny_tokenizer(), None),
    "template": lambda: template_text("~/template.jinja"),
    "another teacher": lambda: check_vocabulary("~/teacher", linearize.load("~/student")),
}


@pytest.mark.parametrize("name", CALLS)
def test_python_takes_it(home: Path, name: str) -> None:
    assert CALLS[name]() is not False


def test_evaluations_and_exports_take_it(home: Path) -> None:
    options = EvaluationOptions(device="cpu", data_root=Path("~/tasks"), tokens=100)
    report = evaluate(
        "~/student", teacher="~/teacher", data=["~/text.txt"], sections=[Language()], out="~/report", options=options
    )
    assert [model.path for model in report.contestants] == [f"{home}/teacher", f"{home}/student"]
    assert (home / "report" / "report.json").is_file()
    assert export_student("~/student", "hf", "~/exported") == home / "exported"
    assert not list((home / "tasks").iterdir())


def test_the_command_takes_it_and_an_evaluation_finds_its_own_text(home: Path) -> None:
    arguments = ["--data", "~/text.txt", "--out", "~/made", "--recipe", "~/own.yaml", *FEW]
    assert main(["convert", "~/teacher", *arguments]) == 0
    report = read_report(home / "made")
    assert report is not None and report.teacher == f"{home}/teacher" and report.data == [f"{home}/text.txt"]
    assert main(["inspect", "~/made", "--backends", "--device", "cpu"]) == 0
    assert main(["generate", "~/made", "--prompt", "a", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    evaluated = evaluate("~/made", data=["~/text.txt"], sections=[Language()], options=CPU)
    assert "the held-out part" in " ".join(evaluated.notes)
    assert not list((home / "tasks").iterdir())


def test_text_that_an_older_report_names_by_the_home_folder_is_known_as_seen(home: Path) -> None:
    write_report(some_report(teacher="~/teacher", data=["~/text.txt"]), home / "student")
    (home / "student" / "recipe.yaml").write_text("data:\n  length: 50\n  heldout: 4\n")
    evaluated = evaluate("~/student", data=[f"{home}/text.txt"], sections=[Language()], options=CPU)
    assert "the held-out part" in " ".join(evaluated.notes)
    assert [model.name for model in evaluated.contestants] == ["teacher", "student"]
