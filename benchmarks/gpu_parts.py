"""Parts of a GPU report that no other script has: what the machine is, the tests of the kernels, SmolLM2's students.

python -m benchmarks.gpu_parts machine
python -m benchmarks.gpu_parts tests --out FILE
python -m benchmarks.gpu_parts student window-linear --seconds 120 --parts .gpu --folder DIR --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import gpu_transfer, smollm2
from benchmarks.on_gpu import device_for, facts
from benchmarks.smollm2_measure import first_rows, losses
from benchmarks.timing import publish
from linearize.decoding.loading import load_any
from linearize.storage.atomic import atomic_write_text
from linearize.training.data.files import file_rows
from linearize.training.data.loading import load_documents

ROOT = Path(__file__).resolve().parents[1]
SMALL_TESTS = ("tests/test_numbers.py",)
MAX_BYTES = 16 * 2**20  # of a student that is kept
TIMED_STEPS, FEWEST_STEPS = 16, 10
MEASURED = 8_192  # held-out tokens that a conversion measures
STARTING = 15  # seconds for imports, and for what comes after the last measurement
SHARE = 0.85  # of the time left that training is planned to take
CHARACTERS = 5  # of text per token, at most: so much is read
SHORT = 100_000  # characters of a document in the timing run


class Counts:
    """A plugin of pytest that counts outcomes by file and writes them after each test."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.began = out, time.monotonic()
        self.rows: dict[str, dict[str, int]] = defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test: its call, or its set-up where that failed or skipped."""
        if report.when != "call" and report.passed:
            return
        self.rows[report.nodeid.partition("::")[0]][report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)
        self.write()

    def write(self) -> None:
        """Write what there is so far."""
        rows = [{"file": file, **counts} for file, counts in sorted(self.rows.items())]
        totals = {key: sum(row[key] for row in rows) for key in ("passed", "skipped")}  # type: ignore[misc]
        document = {**totals, "failed": self.failed, "seconds": time.monotonic() - self.began, "rows": rows}
        if self.out is not None:
            atomic_write_text(self.out, json.dumps(document, indent=1) + "\n")


def gpu_tests() -> list[str]:
    """Files with tests for a GPU: others import packages that a machine with a GPU may lack."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    texts = {file: file.read_text("utf-8") for file in files}
    return [str(file) for file, text in texts.items() if "kernel_device" in text or "pytest.mark.gpu" in text]


def tests(options: argparse.Namespace) -> int:
    """Run the tests of the kernels on the GPU, files in parallel; failed ones are a result, not an error."""
    import pytest

    chosen = SMALL_TESTS if options.interpret else (*gpu_tests(), "-m", "gpu")
    spread = ("-n", "0" if options.interpret else str(min(6, os.cpu_count() or 1)), "--dist", "loadfile")
    parallel = spread if find_spec("xdist") else ("--override-ini=addopts=",)
    counts = Counts(options.out)
    code = pytest.main([*chosen, *parallel, "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"], plugins=[counts])
    counts.write()
    return 0 if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and counts.rows else 1


class Speed:
    """A progress of a conversion that notes when steps ended, by stage."""

    def __init__(self) -> None:
        self.ends: list[list[float]] = []

    def begin(self, name: str, step: int, steps: int) -> None:
        """A stage starts."""
        self.ends.append([time.monotonic()])

    def step(self, step: int, *, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        """A step is done."""
        self.ends[-1].append(time.monotonic())

    def heldout(self, step: int, loss: float, best: float) -> None:
        """The held-out loss is measured: no part of a step's time."""
        self.ends[-1].append(float("nan"))
        self.ends[-1].append(time.monotonic())

    def end(self) -> None:
        """The stage is over."""

    def step_seconds(self) -> list[float]:
        """Of a step of each stage: the median of its second half, after compilation."""
        medians = []
        for ends in self.ends:
            took = [b - a for a, b in pairwise(ends) if b - a > 0]  # no comparison holds with NaN
            medians.append(statistics.median(took[len(took) // 2 :]))
        return medians


def student(options: argparse.Namespace) -> int:
    """Time a short conversion, convert with as many tokens as the time allows, measure, keep the adapter if small."""
    began, work = time.monotonic(), Path(tempfile.mkdtemp(prefix="gpu-student-"))
    teacher, train_file, heldout = sources(options, work)
    length, per_step = options.length, options.length * options.batch
    speed = Speed()

    def train(steps: int, file: str, out: Path, progress: Speed | None = None) -> None:
        chosen = {"teacher": teacher, "data": [file], "tokens": steps * per_step, "length": length}
        chosen |= {"batch": options.batch, "precision": "fp32" if options.interpret else "bf16"}
        further = {"data.measured_tokens": min(MEASURED, options.loss_tokens)}
        smollm2.train(options.row, argparse.Namespace(**chosen), further=further, out=out, progress=progress)

    at = time.monotonic()
    short = first_texts(train_file, work / "short.jsonl", TIMED_STEPS * per_step * CHARACTERS, SHORT)
    train(TIMED_STEPS, short, work / "timed", speed)
    seconds, timed = speed.step_seconds(), time.monotonic() - at
    fixed = timed - sum(TIMED_STEPS * each for each in seconds)
    left = options.seconds - STARTING - (time.monotonic() - began) - 1.5 * fixed  # measuring loads and scores once more
    steps = min(int(SHARE * left / sum(seconds)), options.most_tokens // per_step)
    row: dict[str, Any] = {
        "student": options.row, "step_seconds": seconds, "fixed_seconds": fixed, "length": length,
        "batch": options.batch, "tokens_per_second": [per_step / each for each in seconds], "tokens": steps * per_step,
    }  # fmt: skip
    _publish(options, row)
    if steps < FEWEST_STEPS:
        print(f"{left:.0f} seconds are left for training, {sum(seconds):.2f} for a step of every stage: too few")
        return 1
    train(steps, first_texts(train_file, work / "train.jsonl", steps * per_step * CHARACTERS), work / options.row)
    row["seconds"] = time.monotonic() - began
    row["kept"] = keep(work / options.row, options.folder)
    _publish(options, row)
    row["loss"] = measured(teacher, work / options.row, heldout, length, options.loss_tokens)
    _publish(options, row)
    return 0


def measured(teacher: str, adapter: Path, heldout: str, length: int, tokens: int) -> dict[str, Any]:
    """The losses of teacher and student at a length, on the beginnings of texts that neither was trained on."""
    guide, tokenizer = load_any(teacher)
    made, _ = load_any(teacher, adapter=adapter)
    documents = load_documents([heldout], tokenizer)
    rows = first_rows(documents, length, max(1, tokens // length), int(tokenizer.eos_token_id))
    return losses(guide, made, rows).model_dump()


def sources(options: argparse.Namespace, work: Path) -> tuple[str, str, str]:
    """The teacher's folder, the file to train on and the one to measure on; small ones with `--interpret`."""
    if options.interpret:
        animals, moods = ("fox", "hen", "cow", "owl"), ("glad", "sad", "calm", "mad", "shy")
        stories = [f"The {animal} was {mood} and said: {mood}. " * 9 for animal in animals for mood in moods]
        file = work / "stories.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories), encoding="utf-8")
        return str(ROOT / "src/linearize/demo/teacher"), str(file), str(file)
    joined = gpu_transfer.join(options.parts)
    folder = joined / "teacher"
    if not folder.is_dir():
        smollm2.write_teacher(joined / gpu_transfer.TEACHER, folder)
    return str(folder), str(joined / gpu_transfer.TRAIN), str(joined / gpu_transfer.HELDOUT)


def first_texts(file: str, out: Path, characters: int, longest: int | None = None) -> str:
    """A file with the first texts of another, about so many characters in all and `longest` in each."""
    with out.open("w", encoding="utf-8") as target:
        for number, (_, row) in enumerate(file_rows(Path(file))):
            if characters <= 0 and number > 1:  # one text is held out
                break
            text = str(row["text"])[:longest]  # type: ignore[index]
            target.write(json.dumps({"text": text}) + "\n")
            characters -= len(text) if number else 0
    return str(out)


def keep(student_folder: Path, folder: Path) -> str:
    """Write the student as one compressed file if it is small; returns its name, or why there is none."""
    file = folder / f"student-{student_folder.name}.tar.gz"
    with tempfile.TemporaryDirectory() as work:
        packed = Path(work, file.name)
        with tarfile.open(packed, "w:gz") as tar:
            tar.add(student_folder, student_folder.name)
        if (size := packed.stat().st_size) > MAX_BYTES:
            return f"not kept: {size:,} bytes, {MAX_BYTES:,} at most"
        beside = folder / f".{file.name}.new"
        beside.write_bytes(packed.read_bytes())
    os.replace(beside, file)
    return file.name


def _publish(options: argparse.Namespace, row: dict[str, Any]) -> None:
    setting = {key: str(value) for key, value in vars(options).items()}
    publish("gap to the teacher, nats per token", setting, [row], options.out, whole="loss" in row)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    students = verbs.add_parser("student")
    students.add_argument("row", choices=smollm2.ROWS)
    students.add_argument("--seconds", type=float, default=120, help="for everything")
    students.add_argument("--parts", type=Path, default=ROOT / gpu_transfer.PARTS)
    students.add_argument("--folder", type=Path, required=True, help="where the student is kept")
    students.add_argument("--length", type=int, default=2048)
    students.add_argument("--batch", type=int, default=4)
    students.add_argument("--loss-tokens", type=int, default=65_536)
    students.add_argument("--most-tokens", type=int, default=10_000_000, help="of a stage")
    for verb in (students, verbs.add_parser("tests"), verbs.add_parser("machine")):
        verb.add_argument("--out", type=Path)
        verb.add_argument("--interpret", action="store_true")
    options = parser.parse_args(argv)
    if options.verb == "machine":
        if (device := device_for(options, "benchmarks.gpu_parts", argv)) is None:
            return 2
        print(json.dumps(facts(device)))
        return 0
    if options.verb == "tests":
        return tests(options)
    if options.interpret:
        options.length, options.batch, options.loss_tokens, options.most_tokens = 32, 2, 256, 640
    return student(options)


if __name__ == "__main__":
    sys.exit(main())
