"""The report of a GPU: its parts, their time limits and files, what a stop leaves, and what is carried to a machine."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu_parts, gpu_report, gpu_transfer
from benchmarks.gpu_contents import PARTS, Part, summary

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, os, pathlib, sys, time
name, seconds, code, *rest = sys.argv[1:]
if "--out" not in rest:
    sys.exit(print(json.dumps({"gpu": "none"})))
with open(os.environ["RAN"], "a") as file:
    print(name, file=file)
pathlib.Path(os.environ["RAN"]).with_suffix(".pid").write_text(str(os.getpid()))
out = pathlib.Path(rest[rest.index("--out") + 1])
out.write_text(json.dumps({"rows": [{"x": {"y": [7.25, 9]}, "small": "--interpret" in rest}]}))
time.sleep(float(seconds))
print("the last line of", name)
sys.exit(int(code))
"""
COLUMNS = {"seven": "x.y.0", "small": "small", "absent": "x.z.3"}


def part(name: str, seconds: float = 0, code: int = 0, limit: float = 60) -> Part:
    command = ("fake_part", name, str(seconds), str(code))
    return Part(name=name, what=f"what {name} is", command=command, limit=limit, least=0, columns=COLUMNS)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parts that are a short script."""
    (tmp_path / "fake_part.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    monkeypatch.setattr(gpu_report, "MACHINE", ("fake_part", "machine", "0", "0"))
    return tmp_path


def with_parts(monkeypatch: pytest.MonkeyPatch, *parts: Part) -> None:
    monkeypatch.setattr(gpu_report, "PARTS", parts)


def read(out: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in out.glob("[!.]*.json")}


def report(out: Path, *options: str) -> int:
    return gpu_report.main(["--interpret", "--out", str(out), "--wheels", str(out / "none"), *options])


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


def test_every_part_has_a_file_and_those_that_fail_or_time_out_say_so(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_parts(monkeypatch, part("good"), part("slow", seconds=300, limit=5), part("bad", code=3), part("late"))
    out, archive = fake / "out", fake / "all.tar"
    assert report(out, "--only", "good", "slow", "bad", "--archive", str(archive)) == 0
    assert not runs(int((fake / "ran.pid").read_text()))
    documents = read(out)
    states = {name: documents[name]["status"] for name in documents if name != "machine"}
    assert states == {"good": "done", "slow": "timed out", "bad": "failed"}
    assert documents["bad"]["exit_code"] == 3 and documents["bad"]["output"].endswith("the last line of bad\n")
    assert all(documents[name]["result"]["rows"][0]["x"]["y"] == [7.25, 9] for name in states)
    assert not list(out.glob(".*"))
    text = (out / "summary.md").read_text()
    assert "gpu none" in text and "| slow | timed out |" in text and "| late | not run" in text
    assert text.count("| 7.25 | yes |") == 3 and "absent" not in text
    assert text.strip() in capsys.readouterr().out
    listed = subprocess.run(["tar", "tf", str(archive)], capture_output=True, text=True).stdout.split()
    assert sorted(listed) == sorted(path.name for path in out.iterdir())


def test_parts_without_time_left_are_recorded_as_not_run(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_parts(monkeypatch, part("one"), part("two"))
    monkeypatch.setattr(gpu_report, "RESERVE", 3600)
    assert report(fake / "out") == 0
    assert {document.get("status") for name, document in read(fake / "out").items() if name != "machine"} == {"not run"}
    assert not (fake / "ran").exists()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_stop_leaves_what_is_done_and_a_resumed_report_runs_the_rest(
    fake: Path, monkeypatch: pytest.MonkeyPatch, sign: signal.Signals
) -> None:
    out = fake / "out"
    parts = "[part('first'), part('second', seconds=300), part('third')]"
    code = f"""import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from benchmarks import gpu_report; from benchmarks.gpu_contents import Part
def part(name, seconds=0):
    return Part(name=name, what=name, command=("fake_part", name, str(seconds), "0"), limit=600, least=0)
gpu_report.PARTS, gpu_report.MACHINE = tuple({parts}), ("fake_part", "machine", "0", "0")
sys.exit(gpu_report.main(["--interpret", "--out", {str(out)!r}, "--wheels", {str(out)!r}]))"""
    process = subprocess.Popen([sys.executable, "-c", code])
    while not (fake / "ran").is_file() or "second" not in (fake / "ran").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(sign)
    assert process.wait(60) == (143 if sign == signal.SIGTERM else -signal.SIGKILL)
    for _ in range(100):
        if runs(int((fake / "ran.pid").read_text())):
            time.sleep(0.1)
    assert not runs(int((fake / "ran.pid").read_text()))
    states = {name: document.get("status") for name, document in read(out).items()}
    state = "stopped" if sign == signal.SIGTERM else "running"
    assert states == {"machine": None, "first": "done", "second": state, "third": "not run"}
    text = (out / "summary.md").read_text()
    assert "| first | done |" in text and f"| second | {state}" in text and "| third | not run" in text
    with_parts(monkeypatch, part("first"), part("second"), part("third"))
    assert report(out, "--resume") == 0
    assert (fake / "ran").read_text().split() == ["first", "second", "second", "third"]
    assert {document.get("status", "done") for document in read(out).values()} == {"done"}
    assert report(out, "--only", "first") == 0  # nothing is left out unless asked for
    assert (fake / "ran").read_text().split()[4:] == ["first"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_options_for_a_gpu_are_known_and_without_one_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = [part for part in PARTS if part.name not in ("tests", "window-linear", "lolcats", "exactness")]
    for part in scripts:
        module, *options = part.command
        importlib.import_module(module).main([*options, *part.large])
        assert "nothing was measured" in capsys.readouterr().out
    assert len(scripts) == 5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_report_says_so_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--out", str(tmp_path / "out"), "--wheels", str(tmp_path)]) == 2
    assert "needs a GPU" in (line := capfd.readouterr().err) and line.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_the_tests_and_a_student_run_small_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert report(out, "--only", "tests", "window-linear", "--minutes", "20", "--limit", "500") == 0
    documents = read(out)
    assert documents["tests"]["result"]["passed"] > 10 and documents["tests"]["result"]["failed"] == []
    row = documents["window-linear"]["result"]["rows"][0]
    assert row["tokens"] == 640 and len(row["step_seconds"]) == 2 and row["kept"] == "student-window-linear.tar.gz"
    assert row["loss"]["student"]["kl"]["value"] > 0 and row["loss"]["documents"] > 3
    assert (
        "mixers.safetensors" in subprocess.run(["tar", "tzf", out / row["kept"]], capture_output=True, text=True).stdout
    )
    assert "| student-window-linear.tar.gz |" in (out / "summary.md").read_text()


def test_a_step_takes_what_it_takes_after_compilation_and_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 9.0, 10.0, 11.0, 31.0, 32.5, 34.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    speed = gpu_parts.Speed()
    speed.begin("a stage", 0, 5)
    for step in range(1, 5):
        speed.step(step, loss=1.0, tokens_per_second=1.0, seconds_left=1.0)
    speed.heldout(4, 1.0, 1.0)
    for step in (5, 6):
        speed.step(step, loss=1.0, tokens_per_second=1.0, seconds_left=1.0)
    assert speed.step_seconds() == [1.5]


def test_a_student_is_kept_if_it_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "x").write_bytes(os.urandom(5000))
    assert gpu_parts.keep(tmp_path / "student", tmp_path) == "student-student.tar.gz"
    monkeypatch.setattr(gpu_parts, "MAX_BYTES", 4999)
    (tmp_path / "student-student.tar.gz").unlink()
    assert "not kept" in gpu_parts.keep(tmp_path / "student", tmp_path)
    assert not list(tmp_path.glob("*.gz"))


# What is carried


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, bytes]:
    """A teacher and text in parts of two kilobytes."""
    weights = os.urandom(5003)
    (tmp_path / "t.gguf").write_bytes(weights)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"story {i} " * 9}) + "\n" for i in range(3)))
    (tmp_path / "c.txt").write_text("one\n\n" + "two " * 20_000)
    options = ["--gguf", str(tmp_path / "t.gguf"), "--data", str(tmp_path / "a.jsonl"), str(tmp_path / "c.txt")]
    parts = tmp_path / "parts"
    sizes = ["--heldout", str(tmp_path / "c.txt"), "--parts", str(parts), "--size", str(2000 / 2**20)]
    assert gpu_report.main(["pack", *options, *sizes]) == 0
    return parts, weights


def test_joined_files_are_those_that_were_packed(packed: tuple[Path, bytes]) -> None:
    from linearize.training.data.files import file_rows

    parts, weights = packed
    slices = [sum(f.stat().st_size for f in path.iterdir() if f.suffix != ".json") for path in parts.iterdir()]
    assert len(slices) == 3 and max(slices) <= 2000
    joined = gpu_transfer.join(parts)
    assert (joined / gpu_transfer.TEACHER).read_bytes() == weights
    train = [row["text"] for _, row in file_rows(joined / gpu_transfer.TRAIN)]  # type: ignore[index]
    heldout = [row["text"] for _, row in file_rows(joined / gpu_transfer.HELDOUT)]  # type: ignore[index]
    assert train == [*(f"story {i} " * 9 for i in range(3)), "one", "two " * 20_000]
    assert heldout == ["one", ("two " * 20_000)[:40_000]]


def test_parts_may_come_one_after_the_other_and_one_that_lacks_is_named(packed: tuple[Path, bytes]) -> None:
    parts, weights = packed
    (parts / "2").rename(parts.parent / "away")
    with pytest.raises(gpu_transfer.TransferError, match="part 2 of 3"):
        gpu_transfer.join(parts)
    (parts.parent / "away").rename(parts / "2")
    assert (gpu_transfer.join(parts) / gpu_transfer.TEACHER).read_bytes() == weights
    for number in "123":
        for file in (parts / number).iterdir():
            file.unlink()
    assert gpu_transfer.join(parts) == parts / "joined"  # made once
    with pytest.raises(gpu_transfer.TransferError, match="no part"):
        gpu_transfer.join(parts / "joined")


def test_a_damaged_part_is_refused(packed: tuple[Path, bytes]) -> None:
    parts, _ = packed
    path = next((parts / "2").glob("*.gguf.*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(gpu_transfer.TransferError, match="part 2"):
        gpu_transfer.join(parts)
    assert not (parts / "joined" / gpu_transfer.MANIFEST).exists()


def test_wheels_that_lack_are_installed_and_torch_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, target = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    for name in ("fake_needed", "torch", "transformers"):
        with zipfile.ZipFile(folder / f"{name}-99.5-py3-none-any.whl", "w") as wheel:
            info = f"{name}-99.5.dist-info"
            wheel.writestr(f"{name}.py", "x = 7\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.5\n")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    assert gpu_transfer.install(folder, target) == ["fake_needed"]
    assert (target / "fake_needed.py").is_file() and not (target / "torch.py").exists()
    assert gpu_transfer._lacks("pydantic", "0.1") is False and gpu_transfer._lacks("pydantic", "999.0") is True


def test_the_summary_gives_reasons_in_the_place_of_numbers() -> None:
    rows = [{"times": {"ours": [1234.5678, 2]}}, {"times": {"ours": "out of memory"}}]
    part = {"part": "p", "what": "w", "status": "done", "result": {"rows": rows, "failed": ["a::b"]}}
    text = summary({"gpu": "G", "cuda": None}, [(part, {"ms": "times.ours.0"})])
    assert "| 1,235 |" in text and "| out of memory |" in text and "- failed: a::b" in text and "gpu G" in text
