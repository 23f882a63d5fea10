"""Whether older releases of other libraries would do: the tests that meet them, in an environment that has those.

    python -m scripts.lower_bounds --env FOLDER transformers==5.12.0 peft==0.17.0

FOLDER is a virtual environment; it is made where there is none and kept, so that the next try costs a few downloads. It
gets the releases that are named, whatever pyproject.toml allows, and of the other libraries those that
constraints-lowest.txt names. A few tests reject most releases in a minute; then come those of `make test-lowest`.
Printed: what is installed, what failed and the first line of why. Exit code 1: something failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOWEST = ROOT / "constraints-lowest.txt"
QUICK = ["tests/test_auto_model.py", "tests/test_generation.py", "tests/test_export.py"]
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", re.MULTILINE)


def install(python: Path, *arguments: str) -> None:
    """pip of that environment. Exits where it fails."""
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"pip install {' '.join(arguments)} failed: see above")


def prepared(folder: Path, releases: Sequence[str]) -> Path:
    """The interpreter of the environment, with these releases, and the lowest that are allowed of the others."""
    python = folder / "bin" / "python"
    if not python.is_file():
        print(f"making {folder} (some gigabytes where torch comes with CUDA)", flush=True)
        venv.create(folder, with_pip=True)
        install(python, "--constraint", str(LOWEST), "--editable", ".", "pytest", "pytest-xdist")
        install(python, "--no-deps", "trl>=1.0")  # it asks for newer datasets
    pins = [line for line in LOWEST.read_text("utf-8").splitlines() if "==" in line]
    chosen = {pin.partition("==")[0]: pin for pin in (*pins, *releases)}
    install(python, *chosen.values())
    return python


def failures(python: Path, tests: Sequence[str]) -> list[tuple[str, str]]:
    """The tests that fail there, each with the first line of its error; one entry for all where none could run."""
    command = [python, "-m", "pytest", "-n", "0", "-q", "-W", "ignore", "--tb", "line", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "COLUMNS": "400"}  # columns: for reasons
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    failed = [(name, reason or "") for name, reason in FAILED.findall(done.stdout)]
    if not failed and done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        failed = [("pytest", " ".join(last))]
    return failed


def meeting() -> list[str]:
    """The tests of `make test-lowest`."""
    listed = subprocess.run(["make", "-s", "meeting"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "releases", nargs="*", metavar="NAME==VERSION", help="instead of those in constraints-lowest.txt"
    )
    parser.add_argument("--env", type=Path, required=True, metavar="FOLDER", help="the environment, kept between tries")
    parser.add_argument("--tests", nargs="*", help="these tests alone; default: a few, then those of make test-lowest")
    chosen = parser.parse_args()
    python = prepared(chosen.env.resolve(), chosen.releases)
    names = ("torch", "transformers", "peft", "datasets", "trl", "accelerate", "huggingface_hub")
    code = f"from importlib.metadata import version as v; print(*(f'{{n}} {{v(n)}}' for n in {names}), sep=', ')"
    print(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout, end="", flush=True)
    failed: list[tuple[str, str]] = []
    for tests in [chosen.tests] if chosen.tests else [QUICK, meeting()]:
        failed = failures(python, tests)
        print(f"{len(failed) or 'none'} of {' '.join(Path(test).stem for test in tests)} failed", flush=True)
        for name, reason in failed:
            print(f"  {name}: {reason}", flush=True)
        if failed:
            break
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
