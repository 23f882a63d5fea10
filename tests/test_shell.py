"""The command in a shell: completion, help and errors, without the seconds that torch and transformers take to load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from linearize.cli import completion
from linearize.cli.completion import recipe_values
from linearize.cli.main import COMPLETION, PANELS, main
from linearize.evaluation.suites import SUITES
from linearize.mixers import MIXERS
from linearize.modeling.export import EXPORTS
from linearize.modeling.export.verify import ENGINES
from linearize.recipes import load_recipe, recipe_names
from linearize.recipes.overrides import parse_settings
from linearize.training.stages import STAGES

LIGHT = [
    ["--help"],
    ["-h"],
    ["help"],
    ["help", "convert"],
    ["convert", "-h"],
    ["--version"],
    ["convrt"],
    ["plan", "--devcie", "x"],
]


def complete(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash offers for the last of the words."""
    monkeypatch.setenv(COMPLETION, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["linearize", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    assert main([]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["conv"], ["convert"]),
        (["convert", "t", "--over"], ["--overwrite"]),
        (["convert", "t", "--recipe", ""], recipe_names()),
        (["inspect", "t", "--recipe", "mamba2-in-llama-1"], ["mamba2-in-llama-12.5"]),
        (["recipes", "gdn"], ["gdn-hybrid"]),
        (["convert", "t", "--set", "plan.mixer.name="], [f"plan.mixer.name={name}" for name in sorted(MIXERS)]),
        (["convert", "t", "--set", "plan.mixer.window_sh"], ["plan.mixer.window_shape=", "plan.mixer.window_share="]),
        (["plan", "t", "--set", "stages.1.at="], ["stages.1.at=each", "stages.1.at=last"]),
        (["export", "s", "--to", ""], list(EXPORTS)),
        (["export", "s", "--to", "m"], ["mlx"]),
        (["verify", "f", "--with", ""], list(ENGINES)),
        (["eval", "s", "--suite", "lo"], ["lolcats", "long-context"]),
        (["plan", "t", "--device", "H"], ["H100-80", "H200"]),
        (["convert", "t", "--base", "4"], ["4bit"]),
    ],
)  # fmt: skip
def test_words_are_completed(
    words: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complete(words, monkeypatch, capsys) == expected


def test_completed_names_are_those_of_the_tables() -> None:
    assert list(completion.TARGETS) == list(EXPORTS)
    assert list(completion.ENGINES) == list(ENGINES)
    assert sorted(completion.SUITES) == sorted(SUITES)
    values = recipe_values()
    assert sorted(values["plan.mixer.name"]) == sorted(MIXERS)
    assert sorted(values["stages.0.name"]) == sorted(STAGES)


@pytest.mark.parametrize("name", ["lolcats", "mamba2-in-llama-progressive"])
def test_every_key_of_a_recipe_is_completed(name: str) -> None:
    data, known = yaml.safe_load(load_recipe(name).to_yaml()), set(recipe_values())
    keys = {f"plan.mixer.{key}" for key in data["plan"]["mixer"]} | {f"data.{key}" for key in data["data"]}
    keys |= {f"stages.1.{key}" for key in data["stages"][1]} | set(data) | {f"plan.{key}" for key in data["plan"]}
    assert not keys - known
    assert parse_settings(["plan.mixer.window=16"]).keys() <= known


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_for_a_shell(shell: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": f"/bin/{shell}"}
    command = [sys.executable, "-m", "linearize", "--show-completion", shell]
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert COMPLETION in done.stdout and "linearize" in done.stdout
    command[3] = "--install-completion"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    written = "".join(path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file())
    assert COMPLETION in written


@pytest.mark.parametrize("argv", LIGHT, ids=" ".join)
def test_help_and_bad_usage_load_neither_torch_nor_transformers(argv: list[str], tmp_path: Path) -> None:
    for name in ("torch", "transformers", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')")
    source = Path(__file__).parents[1] / "src"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    command = [sys.executable, "-m", "linearize", *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "is imported" not in done.stderr + done.stdout
    assert done.returncode == (2 if argv[-1] in ("convrt", "x") else 0), done.stderr
    environment[COMPLETION], environment["COMP_WORDS"], environment["COMP_CWORD"] = "complete_bash", "linearize re", "1"
    if argv == ["--help"]:
        done = subprocess.run(command[:3], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["recipes"]


def test_a_program_that_imports_the_package_loads_it_all() -> None:
    code = "import sys, linearize; print('linearize.modeling' in sys.modules)"
    for command in (["-c", code], ["-c", code, "linearize"], ["-c", code, "-m", "linearize"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "True", command


def test_options_are_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    text = capsys.readouterr().out
    titles = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:2] == ["Arguments", "Required"] and titles[-1] == "Options" and len(titles) >= 6
    groups = dict(zip(titles, text.split(":\n")[1:], strict=True))
    assert (
        "--out" in groups["Required"] and "--recipe" in groups["Recipe"] and "--stream" in groups["Memory and devices"]
    )
    assert all(text.count(f"  {option} ") == 1 for option in ("--data", "--set", "--track", "--device", "--overwrite"))
    assert text.isascii()


def test_help_is_a_verb_too(capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for argv in (["--help"], ["-h"], ["help"]):
        assert main(argv) == 0
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1] == pages[2] and pages[0].isascii()
    assert all(f"{panel}:" in pages[0] for panel in PANELS)
    for argv in (["convert", "--help"], ["help", "convert"]):
        assert main(argv) == 0
        pages.append(capsys.readouterr().out)
    assert pages[3] == pages[4] != pages[0]
    assert main(["help", "convrt"]) == 2
    assert "did you mean 'convert'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["convert", "t", "--recipee", "x"], "--recipe"),
        (["generate", "m", "--maxtokens", "3"], "--max-new-tokens"),
        (["plan", "t", "--devcie", "x"], "--device"),
        (["--versio"], "--version"),
        (["evl"], "'eval'"),
    ],
)
def test_a_wrong_word_names_the_nearest(argv: list[str], near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and near in error
