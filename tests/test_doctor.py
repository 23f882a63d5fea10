"""`linearize doctor`: what it sees of an installation, and what it says where a part is missing or broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from linearize.cli import environment
from linearize.cli.main import main
from linearize.mixers import MIXERS
from linearize.version import __version__


def test_this_installation_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["linearize"] == __version__ and result["problems"] == []
    versions = {row["name"]: row["installed"] for row in result["libraries"]}
    assert versions["torch"] == importlib.metadata.version("torch") and {"transformers", "typer", "peft"} <= set(
        versions
    )
    assert {row["status"] for row in result["libraries"]} == {"ok"}
    devices = {row["device"]: row for row in result["devices"]}
    assert len(devices) == 1 + torch.cuda.device_count() and 0 < devices["cpu"]["free"] <= devices["cpu"]["memory"]
    assert {row["mixer"] for row in result["backends"]} == set(MIXERS)
    assert {row["call"] for row in result["backends"]} >= {"decode", "prefill", "training"}
    assert {"eval", "gpu", "gguf"} <= {row["name"] for row in result["extras"]} and "dev" not in result["extras"]


def test_people_get_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    parts = [text.index(f"\n{title}\n") for title in ("libraries", "devices", "backends", "extras")]
    assert parts == sorted(parts) and "no problem" in text
    row = next(line for line in text.splitlines() if line.startswith("window_linear") and line.endswith("lolcats"))
    assert "decoder" in row and "chunked" in row


@pytest.mark.parametrize(
    ("installed", "status", "essential"),
    [(None, "missing", True), ("2.1.0", "2.1.0 is installed, <2.15,>=2.7 is needed", True), ("2.14.7", "ok", False),
     ("2.7.1", "not tested", False)],
)  # fmt: skip
def test_libraries_are_compared_with_what_is_needed(
    installed: str | None, status: str, essential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "torch" and installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return str(installed) if name == "torch" else real(name)

    real = importlib.metadata.version
    monkeypatch.setattr(environment, "version", version)
    monkeypatch.setattr("linearize.version.version", version)

    class Package:
        requires = ("torch>=2.7,<2.15", "pyyaml>=6")
        metadata = importlib.metadata.distribution("pyyaml").metadata

    monkeypatch.setattr(environment, "distribution", lambda name: Package)
    diagnosis = environment.Diagnosis()
    environment._check_requirements(diagnosis)
    assert {row.name: row.status for row in diagnosis.libraries} == {"torch": status, "pyyaml": "ok"}
    assert len(diagnosis.problems) == essential
    if essential:
        assert diagnosis.problems[0].endswith("pip install 'torch<2.15,>=2.7'")
    assert len(diagnosis.notes) == (status == "not tested")


def test_an_extra_names_what_it_lacks_and_the_line_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        requires = ('pyyaml>=6; extra == "a"', 'none-such>=3.1; extra == "a"', 'other-none; extra == "a"',
                    'windows-only; sys_platform == "win32" and extra == "b"', 'none-too; extra == "dev"')  # fmt: skip
        metadata = importlib.metadata.Distribution.from_name("pyyaml").metadata

    Package.metadata = type("Metadata", (), {"get_all": lambda self, key: ["a", "b", "dev"]})()  # type: ignore[assignment]
    monkeypatch.setattr(environment, "distribution", lambda name: Package)
    diagnosis = environment.Diagnosis()
    environment._check_requirements(diagnosis)
    extras = {row.name: row for row in diagnosis.extras}
    assert set(extras) == {"a", "b"}
    assert extras["a"].missing == ("none-such>=3.1", "other-none")
    assert extras["a"].install.endswith("pip install 'none-such>=3.1' other-none")
    assert (extras["b"].missing, extras["b"].install) == ((), "")
    assert [str(Requirement(text)) for text in extras["a"].missing] == list(extras["a"].missing)


@pytest.mark.parametrize("broken", ["transformers", "torch"])
def test_a_broken_library_is_a_line_and_exit_code_one(broken: str, tmp_path: Path) -> None:
    (tmp_path / f"{broken}.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    source = Path(__file__).parents[1] / "src"
    paths = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    command = [sys.executable, "-m", "linearize", "doctor", "--json"]
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == [
        f"{broken} does not import (OSError: libcudart.so.13: cannot open shared object file): install it again"
    ]
    assert len(result["libraries"]) >= 10


def test_a_device_that_miscomputes_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment._computes("cpu") is None
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: 2 * real(*shape, **options))
    assert environment._computes("cpu") == "a sum of 105 is 420.0 there"
    assert "nowhere" in str(environment._computes("nowhere"))
