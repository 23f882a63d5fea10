"""A new user's way, for one or more Pythons: the built wheel in an empty environment, then every step from it alone.

    python -m scripts.fresh_user python3.11 python3.12 python3.13

Each Python gets an environment in a temporary folder with the wheel and nothing else of ours, in a folder outside the
checkout: convert, generate, chat, eval, export, verify, load in Python, push to a stand-in of the Hub, load from
there. A step that fails ends the run with what it printed. The times are printed at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
STORY = "Once upon a time, Lily saw a big dog. She was very happy and wanted to play with it in the park. "
TEACHER = "import linearize, os; print(os.path.join(os.path.dirname(linearize.__file__), 'demo', 'teacher'))"
PYTHON = """
import sys, torch, linearize
from transformers import AutoTokenizer
model, tokenizer = linearize.load("student"), AutoTokenizer.from_pretrained("student")
ids = tokenizer("Once upon a time", return_tensors="pt")
text = model.generate(**ids, max_new_tokens=8, do_sample=False)
assert text.shape[1] == ids["input_ids"].shape[1] + 8
again = linearize.load(sys.argv[1])
same = torch.equal(again(**ids).logits, model(**ids).logits)
assert same, "the student from the Hub is another one"
"""
SMALL = ["--set", "stages.0.tokens=16k", "--set", "stages.1.tokens=16k", "--set", "data.length=128"]


def steps(teacher: str, repository: str) -> dict[str, Sequence[str]]:
    """Arguments of `linearize`, by the name of the step."""
    return {
        "doctor": ["doctor"],
        "plan": ["plan", teacher, "--recipe", "window-linear", "--tokens", "1M", "--device", "H100-80"],
        "convert": [
            "convert", teacher, "--data", "text.txt", "--out", "student", *SMALL, "--push-to", repository, "--private",
        ],
        "generate": ["generate", "student", "--prompt", "Once upon a time", "--max-new-tokens", "8"],
        "chat": ["chat", "student", "--max-new-tokens", "8"],
        "eval": ["eval", "student", "--tokens", "4k", "--limit", "4", "--out", "report"],
        "export": ["export", "student", "--to", "hf", "--out", "native"],
        "verify": ["verify", "native", "--student", "student", "--with", "transformers", "--trust-remote-code"],
    }  # fmt: skip


def walk(python: str, wheel: Path, place: Path, environment: Mapping[str, str], repository: str) -> dict[str, float]:
    """All steps with one Python; seconds by step."""
    seconds: dict[str, float] = {}

    def run(name: str, command: Sequence[str], text: str = "") -> str:
        begun = time.monotonic()
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, cwd=place, env=dict(environment)
        )
        seconds[name] = time.monotonic() - begun
        print(f"{python}: {name}: {seconds[name]:.0f} s", flush=True)
        if done.returncode:
            raise SystemExit(f"{python}: {name} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    run("venv", [python, "-m", "venv", "venv"])
    own = place / "venv" / "bin"
    run("pip install", [str(own / "python"), "-m", "pip", "install", "--quiet", str(wheel)])
    teacher = run("teacher", [str(own / "python"), "-c", TEACHER]).strip()
    (place / "text.txt").write_text("\n\n".join(STORY * (8 + i % 3) + f"The end of story {i}." for i in range(60)))
    for name, arguments in steps(teacher, repository).items():
        run(name, [str(own / "linearize"), *arguments], "Hello\n" if name == "chat" else "")
    run("python", [str(own / "python"), "-c", PYTHON, repository])
    return seconds


def main() -> None:
    """Build the wheel, and walk with each Python."""
    from hub_server import ACCOUNT, TOKEN, running_hub

    pythons = sys.argv[1:] or [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(ROOT)]
        subprocess.run(build, check=True)
        wheel = next(Path(folder).glob("*.whl"))
        for number, python in enumerate(pythons):
            place = Path(folder) / str(number)
            place.mkdir()
            with running_hub() as hub:
                dropped = ("PYTHONPATH", "HF_HUB_OFFLINE", "VIRTUAL_ENV")
                kept = {name: value for name, value in os.environ.items() if name not in dropped}
                hub_of = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(place / "hf")}
                hub_of["HF_HUB_DISABLE_XET"] = "1"  # the stand-in speaks plain HTTP
                cache = {"LINEARIZE_CACHE": str(place / "cache")}
                seconds = walk(python, wheel, place, {**kept, **hub_of, **cache}, f"{ACCOUNT}/student")
                assert hub.repositories[f"{ACCOUNT}/student"].private
            print(f"{python}: all {len(seconds)} steps, {sum(seconds.values()):.0f} s", flush=True)


if __name__ == "__main__":
    main()
