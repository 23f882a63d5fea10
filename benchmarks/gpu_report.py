"""Everything that a GPU has to say in under nine minutes: parts in order of worth, each with a time limit and a file.

    python -m benchmarks.gpu_report [--minutes 8.5] [--only PART ...] [--resume]
    python -m benchmarks.gpu_report --interpret       all parts small, on a CPU
    python -m benchmarks.gpu_report wheels            what a machine without a package index needs (`gpu_transfer`)
    python -m benchmarks.gpu_report pack --gguf FILE --data FILE --heldout FILE

Each part is a process. Its JSON file is written when it ends, so that a stop at any moment costs the part in flight
alone; parts that were stopped or did not run are recorded as such. `summary.md` is made from the files there are. Only
the standard library is imported here: the wheels are installed first.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from benchmarks import gpu_transfer
from benchmarks.gpu_contents import PARTS, Part, summary

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).parent / "gpu"
RESERVE = 5.0  # seconds kept for the last summary and the archive
SHOWN = 2000  # characters of a failed part's output that are kept
MAX_ARCHIVE = 15 * 2**20  # bytes
MACHINE = ("benchmarks.gpu_parts", "machine")
STATUS = ("done", "failed", "timed out", "stopped", "running", "not run")


class Stopped(BaseException):
    """The process was asked to stop."""


def write(path: Path, text: str | bytes) -> None:
    """The whole file or none of it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.replace(beside, path)


class Report:
    """The folder of results: one file per part, the summary, and where asked for an archive of both."""

    def __init__(self, out: Path, archive: Path | None) -> None:
        self.out, self.archive = out, archive
        out.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> dict[str, Any]:
        """What is recorded of a part; of one that never ran its status alone."""
        path = self.out / f"{name}.json"
        document: dict[str, Any] = {"status": "not run", "reason": "never asked for"}
        if path.is_file():
            document = json.loads(path.read_text("utf-8"))
        return document

    def record(self, part: Part, status: str, **more: Any) -> None:
        """Write a part's file and make the summary again."""
        assert status in STATUS
        document = {"part": part.name, "what": part.what, "status": status, **more}
        write(self.out / f"{part.name}.json", json.dumps(document, indent=1) + "\n")
        self.finish()

    def finish(self) -> None:
        """Make the summary, and the archive of all files, the smaller ones first, `MAX_ARCHIVE` bytes at most."""
        documents = [(self.read(part.name), part.columns) for part in PARTS]
        for part, (document, _) in zip(PARTS, documents, strict=True):
            document.update(part=part.name, what=part.what)
        write(self.out / "summary.md", summary(self.read("machine"), documents))
        if self.archive is None:
            return
        held, size = io.BytesIO(), 0
        with tarfile.open(fileobj=held, mode="w") as tar:
            for path in sorted(self.out.glob("[!.]*"), key=lambda file: file.stat().st_size):
                size += path.stat().st_size
                if path.is_file() and size <= MAX_ARCHIVE:
                    tar.add(path, path.name)
        write(self.archive, held.getvalue())


def run_part(part: Part, command: Sequence[str], result: Path, environment: Mapping[str, str], limit: float) -> Any:
    """Run a part's process for so many seconds; returns what to record. With `Stopped` the record is its argument."""
    result.unlink(missing_ok=True)
    began = time.monotonic()

    def record(status: str, output: IO[bytes], **more: Any) -> dict[str, Any]:
        rows = json.loads(result.read_text("utf-8")) if result.is_file() else None
        result.unlink(missing_ok=True)
        output.seek(0)
        shown = output.read().decode(errors="replace")[-SHOWN:] if status != "done" else None
        more |= {"command": list(command), "seconds": round(time.monotonic() - began, 1), "limit_seconds": round(limit)}
        return {"status": status, **more, "output": shown, "result": rows}

    with tempfile.TemporaryFile() as output:
        how: dict[str, Any] = {"stdout": output, "stderr": output, "process_group": 0, "preexec_fn": _end_with_parent}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, **how)
        try:
            code = process.wait(limit)
            return record("done" if code == 0 and result.is_file() else "failed", output, exit_code=code)
        except subprocess.TimeoutExpired:
            _end(process)
            return record("timed out", output)
        except Stopped as stopped:
            _end(process)
            stopped.args = (record("stopped", output),)
            raise


def _end_with_parent() -> None:
    """In a part's process: be killed when the report is, even by SIGKILL (`prctl(2)`, PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)  # the group that it leads, with the processes that it started
    with suppress(subprocess.TimeoutExpired):  # a driver may hold it longer
        process.wait(10)


def run(options: argparse.Namespace, parts: Sequence[Part], environment: Mapping[str, str]) -> int:
    """Run all parts that are to run; returns the exit code."""
    until = options.began + 60 * options.minutes
    report, python = Report(options.out, options.archive), [sys.executable, "-m"]
    looked = [*python, *MACHINE, *["--interpret"] * options.interpret]
    machine = subprocess.run(looked, env=environment, cwd=ROOT, capture_output=True, text=True)
    if machine.returncode != 0:
        print((machine.stdout.strip() or machine.stderr.strip() or "it fails").splitlines()[-1], file=sys.stderr)
        return 2
    write(report.out / "machine.json", machine.stdout.splitlines()[-1] + "\n")
    todo = [part for part in parts if not (options.resume and report.read(part.name)["status"] == "done")]
    for part in todo:
        report.record(part, "not run", reason="not reached")
    for part in todo:
        left = until - time.monotonic() - RESERVE
        limit = min(part.limit if options.limit is None else options.limit, part.share * left)
        if part.share * left < part.least:
            report.record(part, "not run", reason=f"{max(left, 0):.0f} seconds left, it needs {part.least:.0f}")
            continue
        report.record(part, "running", reason="the report was killed if it does not run any more")
        result = report.out / f".{part.name}.rows.json"
        filled = [x.format(seconds=limit, parts=options.parts, out=report.out) for x in part.command]
        command = [*python, *filled, *(part.small if options.interpret else part.large), "--out", str(result)]
        print(f"{part.name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        try:
            document = run_part(part, command, result, environment, limit)
        except Stopped as stopped:
            report.record(part, **stopped.args[0])
            raise
        report.record(part, **document)
        print(f"{part.name}: {document['status']} after {document['seconds']} s", file=sys.stderr, flush=True)
    print((report.out / "summary.md").read_text("utf-8"))
    return 0


def _stop(*_: Any) -> NoReturn:
    raise Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verbs: dict[str, Callable[[Sequence[str]], int]] = {"pack": gpu_transfer.pack_main, "wheels": gpu_transfer.wheels}
    if argv and argv[0] in verbs:
        return verbs[argv[0]](argv[1:])
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything together")
    parser.add_argument("--limit", type=float, help="seconds that a part may take, in the place of its own limit")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="print the parts and their limits")
    parser.add_argument("--resume", action="store_true", help="leave out parts that are done")
    parser.add_argument("--interpret", action="store_true", help="run everything small, on CPU; times mean nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    parser.add_argument("--archive", type=Path, help="a tar file of the results, made again after each part")
    parser.add_argument("--parts", type=Path, default=ROOT / gpu_transfer.PARTS, help="folder that `pack` wrote")
    parser.add_argument("--wheels", type=Path, default=ROOT / gpu_transfer.WHEELS, help="folder that `wheels` wrote")
    options = parser.parse_args(argv)
    options.began, options.out = time.monotonic(), options.out.resolve()
    chosen = [part for part in PARTS if part.name in options.only]
    if options.list:
        print("\n".join(f"{part.name:14} at most {part.limit:3.0f} s  {part.what}" for part in chosen))
        return 0
    before = {sign: signal.signal(sign, _stop) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        return run(options, chosen, gpu_transfer.environment(options.wheels, options.interpret))
    except Stopped:
        print("stopped", file=sys.stderr)
        return 143
    except gpu_transfer.TransferError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


if __name__ == "__main__":
    sys.exit(main())
