"""Which process does which work, where several share a folder: a lease is a small file whose holder keeps renewing it.

A holder that has died, or has not renewed its lease for long, loses it.
"""

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


class Lease:
    """One lease; `check` raises once it has been taken over."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token, self.held = path, token, True

    def check(self) -> None:
        """Raise RuntimeError if another process has taken the work over."""
        if not self.held:
            raise RuntimeError(f"{self.path.name} was taken over by another process while this one stood still")

    def renew(self) -> None:
        """Renew the lease, unless another process holds it by now."""
        if _read(self.path).get("token") != self.token:
            self.held = False
        else:
            os.utime(self.path)


class Leases:
    """Leases in one folder. `stale_seconds`: a lease that was not renewed for so long is free again."""

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self.folder, self.stale_seconds = folder, stale_seconds

    @contextmanager
    def take(self, name: str) -> Iterator[Lease | None]:
        """Yield the lease of this name, None where another process holds it; release it at the end of the block."""
        lease = self._try(name)
        if lease is None:
            yield None
            return
        over = threading.Event()
        beats = threading.Thread(target=self._beat, args=(lease, over), daemon=True)
        beats.start()
        try:
            yield lease
        finally:
            over.set()
            beats.join()
            if _read(lease.path).get("token") == lease.token:
                lease.path.unlink(missing_ok=True)

    def holder(self, name: str) -> str | None:
        """Return who holds a lease, as text."""
        owner = _read(self._path(name))
        return f"{owner.get('host')} (process {owner.get('pid')})" if owner else None

    def _beat(self, lease: Lease, over: threading.Event) -> None:
        while not over.wait(self.stale_seconds / 6) and lease.held:
            try:
                lease.renew()
            except OSError:
                lease.held = False

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.lease"

    def _try(self, name: str) -> Lease | None:
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
        return Lease(path, token)

    def _is_stale(self, path: Path, now: float) -> bool:
        """Whether the holder is dead (where that can be told), or silent for too long."""
        owner = _read(path)
        if owner.get("host") == socket.gethostname() and _born(int(owner.get("pid", 0))) != owner.get("born"):
            return True
        try:
            return now - path.stat().st_mtime > self.stale_seconds
        except FileNotFoundError:
            return True

    @contextmanager
    def _one_at_a_time(self) -> Iterator[float]:
        """Let one process in at a time; yield the time by the clock of the folder's file system."""
        guard = self.folder / "guard"
        with guard.open("w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            except (ImportError, OSError):  # no such locks here: creation of the lease is atomic still
                pass
            os.utime(guard)
            yield guard.stat().st_mtime


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _born(pid: int) -> str | None:
    """Return when a process of this machine was started, None if it does not run: process numbers are reused."""
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
    """Wait before looking again at what the others do."""
    time.sleep(seconds)
