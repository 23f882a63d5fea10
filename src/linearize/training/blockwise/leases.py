"""Which process does which piece of work, where several share a folder: a claim is a small file that its holder keeps
young. A holder that has died, or has not been heard of for long, loses it."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STALE_SECONDS = 120.0


class Claim:
    """One claim; `check` raises once it has been taken over."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token, self.held = path, token, True

    def check(self) -> None:
        """Raises RuntimeError: another process has taken the work over."""
        if not self.held:
            raise RuntimeError(f"{self.path.name} was taken over by another process while this one stood still")

    def renew(self) -> None:
        """Make the claim young, unless it is another's by now."""
        if _read(self.path).get("token") != self.token:
            self.held = False
        else:
            os.utime(self.path)


class Claims:
    """Claims in one folder. `stale_seconds`: without a sign of life for so long a claim is free again."""

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self.folder, self.stale_seconds = folder, stale_seconds

    @contextmanager
    def take(self, name: str) -> Iterator[Claim | None]:
        """The claim of this name, None where another process holds it; given back at the end of the block."""
        claim = self._try(name)
        if claim is None:
            yield None
            return
        over = threading.Event()
        beats = threading.Thread(target=self._beat, args=(claim, over), daemon=True)
        beats.start()
        try:
            yield claim
        finally:
            over.set()
            beats.join()
            if _read(claim.path).get("token") == claim.token:
                claim.path.unlink(missing_ok=True)

    def holder(self, name: str) -> str | None:
        """Who holds a claim, for people."""
        found = _read(self._path(name))
        return f"{found.get('host')} (process {found.get('pid')})" if found else None

    def _beat(self, claim: Claim, over: threading.Event) -> None:
        while not over.wait(self.stale_seconds / 6) and claim.held:
            try:
                claim.renew()
            except OSError:
                claim.held = False

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.claim"

    def _try(self, name: str) -> Claim | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, token = self._path(name), secrets.token_hex(8)
        with self._one_at_a_time() as now:
            if path.exists():
                if not self._is_stale(path, now):
                    return None
                path.unlink(missing_ok=True)
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return None
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                holder = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
                json.dump({**holder, "token": token}, file)
        return Claim(path, token)

    def _is_stale(self, path: Path, now: float) -> bool:
        """Whether the holder is dead (where that can be told), or silent for too long."""
        found = _read(path)
        if found.get("host") == socket.gethostname() and _born(int(found.get("pid", 0))) != found.get("born"):
            return True
        try:
            return now - path.stat().st_mtime > self.stale_seconds
        except FileNotFoundError:
            return True

    @contextmanager
    def _one_at_a_time(self) -> Iterator[float]:
        """Of all processes one at a time; gives the time by the clock of the folder's file system."""
        guard = self.folder / "guard"
        with guard.open("w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            except (ImportError, OSError):  # no such locks here: creation of the claim is atomic still
                pass
            os.utime(guard)
            yield guard.stat().st_mtime


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _born(pid: int) -> str | None:
    """When a process of this machine was started, None for one that is not there: numbers of processes come again."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        return None if state == "Z" else rest[18]
    except (OSError, IndexError):
        try:
            os.kill(pid, 0)
        except OSError:
            return None
        return "unknown"


def wait(seconds: float) -> None:
    """Between two looks at what the others do."""
    time.sleep(seconds)
