"""The command line: exit codes, errors in one line, one JSON document, and verbs that pass on their options."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from report_samples import report_on

from linearize.cli.main import main
from linearize.cli.output import plain, show
from linearize.errors import InputError
from linearize.recipes import DEFAULT_RECIPE, load_recipe, recipe_names

CONVERT = ["convert", "teacher", "--data", "a.txt", "--out", "student"]


@dataclasses.dataclass
class Calls:
    """What the function behind a verb was called with; `result` or `error` is what it answers."""

    arguments: dict[str, Any] | None = None
    result: Any = None
    error: BaseException | None = None


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, calls: Calls) -> Calls:
    """Replace a function by one that records its arguments, checked against the real signature."""
    importlib.import_module(module)
    signature = inspect.signature(getattr(sys.modules[module], name))

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.arguments = dict(signature.bind(*args, **kwargs).arguments)
        print("chatter on stdout")
        if calls.error is not None:
            raise calls.error
        return calls.result

    monkeypatch.setattr(sys.modules[module], name, record)
    return calls


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of a command that fails: one line on stderr."""
    code = main(argv)
    error = capsys.readouterr().err
    assert error.startswith("linearize: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return code, error


# usage


def test_every_verb_counts_subnormal_numbers_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "linearize.demo.run", "run_demo", Calls())
    torch.set_flush_denormal(False)
    small = torch.tensor([1e-30])
    assert (small * 1e-10).item() > 0
    seen: list[float] = []
    monkeypatch.setattr("linearize.cli.verb._quiet_libraries", lambda: seen.append((small * 1e-10).item()))
    assert main(["demo"]) == 0
    assert seen == [0.0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["Missing command", "--help"]),
        (["convrt"], ["'convrt'", "convert"]),
        (["convert", "teacher"], ["--out", "linearize convert --help"]),
        (["convert", "teacher", "--out", "b"], ["no data", "--data", "data.sources"]),
        (["convert", "--data", "a.txt", "--out", "b"], ["TEACHER"]),
        ([*CONVERT, "--recipee", "x"], ["--recipee", "--recipe"]),
        ([*CONVERT, "--set", "window"], ["'window'", "KEY=VALUE"]),
        (["generate", "model", "--prompt", "a", "--max-new-tokens", "few"], ["'few'", "max-new-tokens"]),
        (["export", "student", "--out", "b"], ["--to", "linearize export --help"]),
        (["export", "student", "--to", "granite", "--out", "b"], ["'granite'", "did you mean 'granite-hybrid'"]),
        (["recipes", "lolcat"], ["'lolcat'", "did you mean 'lolcats'"]),
        (["recipes", "none.yaml"], ["none.yaml", "no such file"]),
    ],
)
def test_bad_usage_is_one_line_and_two(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, message = failure(argv, capsys)
    assert code == 2
    assert all(word in message for word in words), message


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    verbs = [line.split()[0] for line in text.partition("Make a student:")[2].splitlines() if line.startswith("  ")]
    assert verbs == [
        "demo",
        "convert",
        "plan",
        "recipes",
        "generate",
        "chat",
        "export",
        "verify",
        "serve",
        "eval",
        "bench",
        "inspect",
        "doctor",
        "help",
    ]
    assert main(["convert", "--help"]) == 0
    assert DEFAULT_RECIPE in re.sub(r"-\n +", "-", capsys.readouterr().out)


@pytest.mark.slow
def test_the_command_itself_exits_with_the_code() -> None:
    command = [sys.executable, "-m", "linearize"]
    bad = subprocess.run([*command, "recipes", "lolcat"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    good = subprocess.run([*command, "recipes", "--json"], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert [row["name"] for row in json.loads(good.stdout)] == recipe_names()


def test_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"linearize {project['version']}\n"


# recipes


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and load_recipe(name).description in listed for name in recipe_names())
    assert main(["recipes", "lolcats"]) == 0
    (tmp_path / "copy.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "copy.yaml") == load_recipe("lolcats")
    assert main(["recipes", "lolcats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == load_recipe("lolcats").model_dump(mode="json")


# verbs


def test_convert_passes_on_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "linearize.conversion.api", "convert", Calls())
    assert main(CONVERT) == 0
    assert calls.arguments is not None
    assert calls.arguments["teacher"] == "teacher" and list(calls.arguments["data"]) == ["a.txt"]
    assert not {"recipe", "device", "track"} & set(calls.arguments), "defaults belong to convert itself"
    more = ["--data", "self", "--recipe", "t2r", "--set", "plan.mixer.window=16", "--set", "seed=3", "--overwrite"]
    assert main([*CONVERT, *more, "--device", "cpu", "--track", "tensorboard", "--trust-remote-code"]) == 0
    passed = calls.arguments
    assert (passed["recipe"], passed["device"], passed["overwrite"]) == ("t2r", "cpu", True)
    assert passed["overrides"] == {"plan.mixer.window": 16, "seed": 3}
    assert (list(passed["data"]), list(passed["track"]), passed["trust_remote_code"]) == (
        ["a.txt", "self"],
        ["tensorboard"],
        True,
    )
    assert Path(passed["out"]) == Path("student")
    blocks = ["--stream", "--blocks", "0-3,7", "--memory", "24GB", "--disk", "2TB"]
    assert main([*CONVERT, "--overwrite", "--track", "wandb", *blocks]) == 0
    passed = calls.arguments
    assert [passed[name] for name in ("stream", "blocks", "memory", "disk")] == [True, "0-3,7", 24 * 10**9, 2 * 10**12]
    assert (passed["overwrite"], list(passed["track"])) == (True, ["wandb"])


def test_generate_chat_and_demo_pass_on_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = stand_in(monkeypatch, "linearize.decoding.generate", "generate_text", Calls())
    assert main(["generate", "model", "--prompt", "Once", "--max-new-tokens", "7", "--compile"]) == 0
    assert generate.arguments is not None
    assert list(generate.arguments.values())[:2] == ["model", "Once"]
    assert [generate.arguments[name] for name in ("max_new_tokens", "compile", "prompt_lookup")] == [7, True, False]
    assert not {"temperature", "seed", "draft"} & set(generate.arguments)
    chat = stand_in(monkeypatch, "linearize.decoding.generate", "chat", Calls())
    assert main(["chat", "model", "--temperature", "0.5", "--seed", "3"]) == 0
    assert list((chat.arguments or {}).values()) == ["model", 0.5, 3]
    demo = stand_in(monkeypatch, "linearize.demo.run", "run_demo", Calls())
    assert main(["demo", "--out", "here"]) == 0
    assert demo.arguments == {"out": Path("here")}


def test_json_is_the_only_thing_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"loss": 1.5, "worst": float("inf"), "layers": [{"layer": 0, "mixer": "lolcats"}]}
    stand_in(monkeypatch, "linearize.modeling.inspect", "inspect_model", Calls(result=result))
    assert main(["inspect", "student", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": 1.5, "worst": None, "layers": [{"layer": 0, "mixer": "lolcats"}]}
    assert "chatter" in err


@pytest.mark.parametrize("verb", ["eval", "bench"])
def test_the_document_of_an_evaluation_is_its_report(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_on(("teacher", "student"), {})
    name = "evaluate" if verb == "eval" else "bench"
    stand_in(monkeypatch, "linearize.evaluation", name, Calls(result=report))
    assert main([verb, "student", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == report.to_json() and "teacher_loss" not in json.loads(out)
    assert "chatter" in err


def test_results_are_printed_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"layers": [{"layer": 0, "mixer": "lolcats"}], "gap": 1.5}
    stand_in(monkeypatch, "linearize.modeling.inspect", "inspect_model", Calls(result=result))
    assert main(["inspect", "student"]) == 0
    out = capsys.readouterr().out
    assert "lolcats" in out and "1.5000" in out
    report = report_on(("teacher", "student"), {})
    evaluation = stand_in(monkeypatch, "linearize.evaluation", "evaluate", Calls(result=report))
    printed = stand_in(monkeypatch, "linearize.evaluation", "print_report", Calls())
    assert main(["eval", "student", "--data", "a.txt", "--limit", "2k", "--teacher", "t"]) == 0
    arguments = dict(evaluation.arguments or {})
    assert arguments.pop("options").limit == 2000
    assert arguments.items() >= {"data": ["a.txt"], "teacher": "t"}.items()
    assert list((printed.arguments or {}).values()) == [report]


# errors


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("window -3\ngiven; allowed: 0 or more"), 2, ["window -3 given"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 2, ["a.txt", "check the path"]),
        (PermissionError(errno.EACCES, "Permission denied", "b"), 2, ["b", "Permission denied"]),
        (OSError(errno.ENOSPC, "No space left on device"), 1, ["no space left", "free some"]),
        (RuntimeError("writer: No space left on device (os error 28)"), 1, ["no space left"]),
        (RuntimeError("shapes\n  differ"), 1, ["RuntimeError: shapes differ", "--debug"]),
        (AssertionError(), 1, ["AssertionError"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
)
def test_an_error_is_one_line_with_its_code(
    error: BaseException,
    code: int,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in(monkeypatch, "linearize.conversion.api", "convert", Calls(error=error))
    exit_code, message = failure(CONVERT, capsys)
    assert exit_code == code
    assert all(word in message for word in words), message


@pytest.mark.parametrize("argv", [["--debug", *CONVERT], [*CONVERT, "--debug"]])
def test_debug_shows_the_traceback(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "linearize.conversion.api", "convert", Calls(error=InputError("no such window")))
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1] == "linearize: no such window"


# output


def test_results_become_plain_data() -> None:
    @dataclasses.dataclass
    class Result:
        loss: float
        where: Path
        bins: tuple[Any, ...]

    assert plain(Result(float("nan"), Path("a/b"), (1, {2: True}))) == {
        "loss": None,
        "where": "a/b",
        "bins": [1, {"2": True}],
    }
    with pytest.raises(TypeError, match="object"):
        plain({"x": object()})


def test_results_for_people_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"loss": 1.25, "tokens": 2000000, "layers": [{"layer": 0, "mixer": None}, {"layer": 11, "mixer": "lolcats"}]}
    show(data)
    assert capsys.readouterr().out.splitlines() == [
        "loss    1.2500",
        "tokens  2,000,000",
        "",
        "layers",
        "layer  mixer",
        "    0  -",
        "   11  lolcats",
    ]
