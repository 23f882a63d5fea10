"""DPO on a small student: does the margin grow, and does a killed run end with the weights of an uninterrupted one?

    python benchmarks/dpo_run.py --teacher ../shared/teachers/stories260k \\
        --data ../shared/data/preferences/dpo_en_demo.json --out benchmarks/dpo_run.json

The student is the teacher with `lolcats` mixers as they start, not trained. Each run is a process of its own; one of
them kills itself (SIGKILL) in the middle and is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import publish
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.io.teacher import load_teacher
from linearize.training.dataset_stage import StageJob
from linearize.training.progress import LineProgress
from linearize.training.stages.dpo import DpoConfig

WINDOW = 16
TARGET = "the margin grows; a run killed half-way and resumed ends with the weights of an unbroken one"


class Deadly(LineProgress):
    """Lines on stderr, and SIGKILL after a step."""

    def __init__(self, kill_at: int | None) -> None:
        super().__init__()
        self.kill_at = kill_at

    def step(self, step: int, *, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        """Report the step; at the chosen step, kill the process."""
        super().step(step, loss=loss, tokens_per_second=tokens_per_second, seconds_left=seconds_left)
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def work(options: argparse.Namespace) -> None:
    """One process: run or continue the stage in its folder, and write the result as JSON."""
    torch.set_num_threads(options.threads)
    teacher, tokenizer = load_teacher(options.teacher)
    plan = [MIXERS["lolcats"].model_validate({"name": "lolcats", "window": WINDOW})] * teacher.config.num_hidden_layers
    student = LinearizedForCausalLM.from_teacher(teacher, plan)
    job = StageJob(
        student=student, teacher=teacher, tokenizer=tokenizer, folder=options.work, progress=Deadly(options.kill_at)
    )
    stage = settings(options)
    result = stage.run(job)
    digest = hashlib.sha256()
    for value in student.state_dict().values():
        digest.update(value.numpy().tobytes())
    results = {
        "pairs": len(stage.rows(tokenizer, job.context)), "steps": result.steps, "tokens": result.tokens,
        "seconds": round(result.seconds, 1), "losses": dict(result.losses), "weights": digest.hexdigest(),
        **{name: dict(result.metrics[name]) for name in ("rewards/margins", "rewards/accuracies")},
    }  # fmt: skip
    (options.work / "result.json").write_text(json.dumps(results), encoding="utf-8")


def settings(options: argparse.Namespace) -> DpoConfig:
    """The stage."""
    return DpoConfig(
        data=options.data, chat_template="plain", length=options.length, batch=8, max_steps=options.steps, epochs=9,
        lr=options.lr, beta=options.beta, warmup=2, seed=0,
    )  # fmt: skip


def run(folder: Path, arguments: list[str], *extra: str) -> tuple[int, dict[str, Any]]:
    """Run a process over a folder; return its exit code and result."""
    code = subprocess.run([sys.executable, __file__, *arguments, "--work", str(folder), *extra], check=False).returncode
    file = folder / "result.json"
    return code, json.loads(file.read_text("utf-8")) if file.is_file() else {}


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, help="JSON file to write; the result is printed in any case")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        work(options)
        return
    kill_at = options.steps // 2 + 1
    with tempfile.TemporaryDirectory() as folder:
        unbroken = run(Path(folder, "unbroken"), sys.argv[1:])
        killed = run(Path(folder, "killed"), sys.argv[1:], "--kill-at", str(kill_at))
        resumed = run(Path(folder, "killed"), sys.argv[1:])
    assert (unbroken[0], killed, resumed[0]) == (0, (-signal.SIGKILL, {}), 0), "a run failed, or was not killed"
    result, again = unbroken[1], resumed[1]
    margins = list(result["rewards/margins"].values())
    part = max(1, len(margins) // 5)
    rows = {
        **{key: result[key] for key in ("pairs", "steps", "tokens", "seconds")},
        "margin_first_fifth": statistics.mean(margins[:part]),
        "margin_last_fifth": statistics.mean(margins[-part:]),
        "killed_after_step": kill_at,
        "resumed_weights_equal": again["weights"] == result["weights"],
        "resumed_margins_equal": again["rewards/margins"] == result["rewards/margins"],
        **{key: result[key] for key in ("rewards/margins", "rewards/accuracies", "losses")},
    }
    setting = {"teacher": options.teacher, "mixer": {"name": "lolcats", "window": WINDOW}, "layers": "all"}
    publish(TARGET, {**setting, "stage": settings(options).model_dump(mode="json")}, [rows], options.out)


if __name__ == "__main__":
    main()
