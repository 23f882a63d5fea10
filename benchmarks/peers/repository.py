"""A peer's repository outside ours: its modules, its commit, and the teacher in a form that its libraries read.

Needs torch alone of what is not in Python, so that it runs in a peer's own environment.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "numpy", "peft", "accelerate", "trl", "mamba-ssm", "triton")


def open_repository(folder: Path, needs: tuple[str, ...]) -> None:
    """Put a repository first on the import path.

    Raises:
        ValueError: a folder without the files that the peer's code is recognised by, or not a git checkout.
    """
    if missing := [name for name in needs if not (folder / name).exists()]:
        raise ValueError(f"--repo {folder}: no {missing[0]} in it: clone the peer's repository there")
    if _git(folder, "rev-parse", "HEAD") is None:
        raise ValueError(f"--repo {folder}: not a git checkout, so its commit is unknown: clone the repository")
    sys.path.insert(0, str(folder.resolve()))


def teacher_folder(teacher: Path, layers: int | None) -> Path:
    """A temporary copy of a Llama's config as older transformers read it, next to a link to its weights.

    `layers`: keep only the first. Raises ValueError for another architecture or rotary positions of another kind.
    """
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama":
        raise ValueError(f"--teacher {teacher}: a {config.get('model_type')}: the peers' code reads a llama")
    rope = config.pop("rope_parameters", None) or {"rope_theta": config.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise ValueError(f"--teacher {teacher}: scaled rotary positions: give one without")
    config["rope_theta"] = rope["rope_theta"]
    config["torch_dtype"] = "float32"
    config.pop("dtype", None)
    if layers is not None:
        if layers > config["num_hidden_layers"]:
            raise ValueError(f"--layers {layers}: the teacher has {config['num_hidden_layers']}")
        config["num_hidden_layers"] = layers
    folder = Path(tempfile.mkdtemp(prefix="llama-"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for weights in teacher.glob("*.safetensors*"):
        (folder / weights.name).symlink_to(weights.resolve())
    return folder


def provenance(repository: Path, seed: int) -> dict[str, Any]:
    """As `linearize.metrics.report.provenance`, which does not import here; `repository`: the peer's."""
    root = Path(__file__).resolve().parents[2]
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _git(root, "rev-parse", "HEAD"),
        "modified": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "repository": {
            "name": repository.resolve().name,
            "commit": _git(repository, "rev-parse", "HEAD"),
            "modified": (_git(repository, "diff", "--name-only", "--diff-filter=M", "HEAD") or "").split(),
        },
        "libraries": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "hardware": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "platform": platform.platform(),
        },
        "load": os.getloadavg()[0],
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text(errors="replace").splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
