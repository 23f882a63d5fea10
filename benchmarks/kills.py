"""A long command killed with SIGKILL at random moments and run again each time, compared with an uninterrupted run.

    python -m benchmarks.kills --kills 20 --out FILE -- convert TEACHER --data self --out STUDENT ...

The command after `--` is any of linearize that writes a folder (`--out`). Both runs have caches of their own. Compared
are all files of the two folders: weights by their bytes, reports by all that is no time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.timing import publish

TARGET = "after every kill the same command continues, and it ends with the same folder as an uninterrupted run"
TIMES = {"seconds", "provenance"}  # keys of a report that differ between any two runs
EARLY, REACH = 0.2, 3.0  # share of kills while the program starts; see --reach
TICK = 0.02
LONGEST = 3600.0  # seconds for one attempt


class Fork:
    """A command as a fork of this process, which has imported everything, with a part of `Popen`'s interface."""

    def __init__(self, arguments: Sequence[str], output: int, environment: Mapping[str, str]) -> None:
        """Starts it with both outputs going to a file's descriptor."""
        sys.stdout.flush()
        self.returncode: int | None = None
        self.process = os.fork()
        if self.process == 0:
            os.environ.update(environment)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["linearize", *arguments]
            code = 1
            try:
                runpy.run_module("linearize", run_name="__main__")
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        """Waits for its end."""
        return self._wait(0)

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.process, signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.process, options)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


@dataclass(kw_only=True)
class Victim:
    """A command with an `--out` of its own, and what happened to it."""

    arguments: list[str]
    out: Path
    cache: Path
    forked: bool = False
    kills: list[dict[str, Any]] = field(default_factory=list)
    finishes: int = 0

    @classmethod
    def of(cls, command: Sequence[str], out: Path, forked: bool) -> Victim:
        """The command with another `--out`."""
        if "--out" not in command:
            raise SystemExit("kills: the command after -- needs --out")
        arguments = list(command)
        arguments[arguments.index("--out") + 1] = str(out)
        return cls(arguments=arguments, out=out, cache=out.parent / f"{out.name}.cache", forked=forked)

    def run(self, kill_after: float | None = None, *, from_first_line: bool = False) -> tuple[int, float, list[str]]:
        """One attempt: its exit code, seconds until its first output, and its output.

        It is killed after so many seconds, if it still runs; `from_first_line` counts them from its first line on.
        """
        environment = {**os.environ, "LINEARIZE_CACHE": str(self.cache), "PYTHONUNBUFFERED": "1"}
        output_file = self.out.parent / f"{self.out.name}.out"
        began, spoke = time.monotonic(), 0.0
        with output_file.open("w", encoding="utf-8") as file:
            process: Any = (
                Fork(self.arguments, file.fileno(), environment)
                if self.forked
                else subprocess.Popen(
                    [sys.executable, "-m", "linearize", *self.arguments], stdout=file, stderr=file, env=environment
                )
            )
            while process.poll() is None:
                time.sleep(TICK)
                now = time.monotonic() - began
                if not spoke and output_file.stat().st_size:
                    spoke = now
                waited = now - spoke if spoke or not from_first_line else 0.0
                if now > LONGEST or (kill_after is not None and waited >= kill_after):
                    process.kill()
                    process.wait()
        lines = output_file.read_text(encoding="utf-8").splitlines()
        output_file.unlink()
        return process.returncode, spoke, lines

    def left_beside(self) -> list[str]:
        """The hidden files and folders next to the folder."""
        return sorted(path.name for path in self.out.parent.glob(f".{self.out.name}.*"))

    def clear(self) -> None:
        """Remove everything that the command wrote."""
        for path in (self.out, self.cache, *self.out.parent.glob(f".{self.out.name}.*")):
            shutil.rmtree(path, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run it, print the result, and write it to `--out`; the exit code is 1 where the two runs differ."""
    arguments = _arguments(argv)
    place = arguments.work.resolve()
    place.mkdir(parents=True, exist_ok=True)
    whole, broken = (Victim.of(arguments.command, place / name, arguments.fork) for name in ("whole", "broken"))
    for victim in (whole, broken):
        victim.clear()
    began = time.monotonic()
    code, start, lines = whole.run()
    seconds = time.monotonic() - began
    if code:
        raise SystemExit(f"kills: the unbroken run failed ({code}): {lines[-1:]}")
    share = arguments.reach * (seconds - start) / arguments.kills
    torture(broken, arguments.kills, start=start, share=share, seed=arguments.seed)
    differing = differences(whole.out, broken.out)
    setting = {
        "killed_command": ["linearize", *arguments.command],
        "unbroken_seconds": round(seconds, 1),
        "seed": arguments.seed,
        "forked": arguments.fork,
        "ended_before_all_kills": broken.finishes - 1,
        "files": sorted(str(path.relative_to(whole.out)) for path in whole.out.rglob("*") if path.is_file()),
        "differing": differing,
        "left_beside": broken.left_beside(),
    }
    publish(TARGET, setting, broken.kills, arguments.out)
    if differing or broken.left_beside():
        raise SystemExit(1)


def torture(victim: Victim, kills: int, *, start: float, share: float, seed: int) -> None:
    """Start, kill and start again until so many kills have hit, then let it end.

    `start`: seconds until an unbroken run says something; `share`: most that a kill lets pass after that. A run that
    ends before all kills is cleared away and begun again.
    """
    generator = random.Random(seed)
    while len(victim.kills) < kills:
        early = generator.random() < EARLY
        delay = generator.uniform(0.0, start if early else share)
        code, _, lines = victim.run(delay, from_first_line=not early)
        if code == 0:
            victim.finishes += 1
            victim.clear()
        elif code == -signal.SIGKILL:
            counted = "seconds" if early else "seconds_after_the_first_line"
            victim.kills.append({counted: round(delay, 2), "while": _moment(victim, lines)})
            print(f"kill {len(victim.kills)}: {victim.kills[-1]}", file=sys.stderr, flush=True)
        else:
            _fail(code, lines)
    code, _, lines = victim.run()
    if code:
        _fail(code, lines)
    victim.finishes += 1


def differences(one: Path, other: Path) -> list[str]:
    """Files of two folders that are not the same; of JSON, all but times counts, and logs in pictures do not."""
    names = sorted({str(path.relative_to(root)) for root in (one, other) for path in root.rglob("*") if path.is_file()})
    return [name for name in names if not _same(one / name, other / name)]


def _same(one: Path, other: Path) -> bool:
    if not one.is_file() or not other.is_file():
        return False
    if one.suffix in (".png", ".html", ".md", ".svg"):  # drawn from the report, with its times
        return True
    if one.suffix in (".json", ".jsonl"):
        first, second = (path.read_text(encoding="utf-8") for path in (one, other))
        if one.suffix == ".jsonl":
            return [_timeless(json.loads(x)) for x in first.splitlines()] == [
                _timeless(json.loads(x)) for x in second.splitlines()
            ]
        return bool(_timeless(json.loads(first)) == _timeless(json.loads(second)))
    return one.read_bytes() == other.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(entry) for key, entry in value.items() if key not in TIMES}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def _moment(victim: Victim, lines: Sequence[str]) -> str:
    """Where a run was killed, as far as its folders and its last line show."""
    if any(".partial-" in name for name in victim.left_beside()):
        return "the folder is written"
    if victim.out.exists():
        return "the folder has its name"
    return lines[-1][:100] if lines else "nothing was said"


def _fail(code: int, lines: Sequence[str]) -> NoReturn:
    raise SystemExit(f"kills: the command failed with exit code {code}: {' | '.join(lines[-3:])}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--fork", action="store_true", help="start by fork: no kill while the package is imported")
    parser.add_argument("--reach", type=float, default=REACH, help="most work that a kill lets pass, in shares of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("kills-work"), help="folder for both runs")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("command", nargs="+", help="a command of linearize, after --")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
