"""What a machine without a network needs for a GPU report: wheels, a teacher and text, in parts below a given size.

`pack` writes folders `1`, `2`, ... of slices, each with the manifest of all; they can be carried one at a time, in any
order, and `join` puts the files together again and refuses what is damaged or missing. A GGUF file is compressed with
gzip, text becomes `.jsonl.xz`, which a data SPEC can name. Only the standard library is imported at first.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS, WHEELS = ".gpu", ".whl"  # default folders, which git ignores
MANIFEST, JOINED = "manifest.json", "joined"
TEACHER, TRAIN, HELDOUT = "teacher.gguf", "train.jsonl.xz", "heldout.jsonl.xz"
HELDOUT_CHARACTERS = 40_000  # of each held-out text: 8,192 tokens and more
MIB = 2**20
# What the package and these scripts import, besides torch, transformers, triton, numpy, matplotlib and pytest.
PACKAGES = (
    "annotated-types", "einops", "fla-core", "flash-linear-attention", "gguf", "peft", "pydantic", "pydantic-core",
    "safetensors", "typing-extensions", "typing-inspection", "xxhash",
)  # fmt: skip
NEVER = ("torch", "transformers", "triton", "numpy", "tokenizers")  # of a machine's own, whatever a folder holds
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


class TransferError(ValueError):
    """Parts that are missing or damaged; one line that says which."""


def pack(files: dict[str, bytes], folder: Path, size: int) -> int:
    """Cut files into folders of at most `size` bytes each; returns how many. `teacher.gguf` is compressed."""
    if size < 1:
        raise TransferError(f"parts of {size} bytes given; allowed: 1 byte or more")
    manifest: dict[str, Any] = {}
    number, free = 1, size
    for name, content in files.items():
        content = gzip.compress(content, 6, mtime=0) if name == TEACHER else content
        slices: list[dict[str, Any]] = []
        at = 0
        while at < len(content):
            if not free:
                number, free = number + 1, size
            chunk = content[at : at + free]
            path = folder / str(number) / f"{name}.{len(slices)}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(chunk)
            slices.append({"part": number, "file": path.name, "sha256": _digest(chunk)})
            at, free = at + len(chunk), free - len(chunk)
        manifest[name] = {"bytes": len(content), "sha256": _digest(content), "slices": slices}
    text = json.dumps({"parts": number, "files": manifest}, indent=1) + "\n"
    for part in range(1, number + 1):
        (folder / str(part) / MANIFEST).write_text(text, encoding="utf-8")
    return number


def join(folder: Path) -> Path:
    """The folder with the whole files, made from the parts if it is not there yet.

    Raises TransferError where no part, or not every part is there, or a slice is not what was packed.
    """
    manifests = sorted({path.read_text("utf-8") for path in folder.glob(f"*/{MANIFEST}") if path.parent.name != JOINED})
    joined = folder / JOINED
    if not manifests and (joined / MANIFEST).is_file():
        return joined
    if len(manifests) != 1:
        state = "parts of several packings" if manifests else "no part"
        raise TransferError(f"{folder} has {state}: pack again (python -m benchmarks.gpu_report pack) and carry all")
    if (joined / MANIFEST).is_file() and (joined / MANIFEST).read_text("utf-8") == manifests[0]:
        return joined
    manifest = json.loads(manifests[0])
    absent = [n for n in range(1, manifest["parts"] + 1) if not (folder / str(n) / MANIFEST).is_file()]
    if absent:
        raise TransferError(f"{folder} lacks part {', '.join(map(str, absent))} of {manifest['parts']}: carry it too")
    joined.mkdir(exist_ok=True)
    for name, entry in manifest["files"].items():
        content = b"".join(_slices(folder, entry["slices"]))
        if _digest(content) != entry["sha256"]:
            raise TransferError(f"{name} is not what was packed: pack again and carry all parts")
        content = gzip.decompress(content) if name == TEACHER else content
        (joined / name).write_bytes(content)
    (joined / MANIFEST).write_text(manifests[0], encoding="utf-8")  # last: the folder is whole
    return joined


def _slices(folder: Path, slices: Sequence[dict[str, Any]]) -> Iterator[bytes]:
    for entry in slices:
        path = folder / str(entry["part"]) / entry["file"]
        if not path.is_file() or _digest(content := path.read_bytes()) != entry["sha256"]:
            state = "damaged" if path.is_file() else "missing"
            raise TransferError(f"{path} is {state}: carry part {entry['part']} again")
        yield content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def texts(specs: Sequence[str], characters: int | None = None) -> bytes:
    """The rows with `text` of data files as compressed JSON lines; `characters`: at most so many of each."""
    from linearize.training.data.files import file_rows

    lines = []
    for spec in specs:
        for number, row in file_rows(Path(spec)):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise TransferError(f"{spec}, row {number}: has no 'text'; give rows with it, or a .txt file")
            lines.append(json.dumps({"text": row["text"][:characters]}, ensure_ascii=False) + "\n")
    return lzma.compress("".join(lines).encode())


def pack_main(argv: Sequence[str]) -> int:
    """The command `pack`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_report pack", description="write a teacher and text as parts to carry")
    parser.add_argument("--gguf", type=Path, required=True, help="the teacher")
    parser.add_argument("--data", nargs="+", required=True, help="files to train on")
    parser.add_argument("--heldout", nargs="+", required=True, help="files to measure on")
    parser.add_argument("--parts", type=Path, default=ROOT / PARTS)
    parser.add_argument("--size", type=float, default=50, help="MiB of a part, at most")
    options = parser.parse_args(argv)
    if options.parts.exists() and any(options.parts.iterdir()):
        parser.error(f"--parts {options.parts} is not empty: remove it, or name another folder")
    try:
        files = {
            TEACHER: options.gguf.read_bytes(),
            TRAIN: texts(options.data),
            HELDOUT: texts(options.heldout, HELDOUT_CHARACTERS),
        }
        number = pack(files, options.parts, int(options.size * MIB))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for part in range(1, number + 1):
        size = sum(file.stat().st_size for file in (options.parts / str(part)).iterdir())
        print(f"{options.parts / str(part)}: {size / MIB:.1f} MiB")
    return 0


def wheels(argv: Sequence[str]) -> int:
    """The command `wheels`: download `PACKAGES` for CPython 3.12 on Linux; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_report wheels", description=wheels.__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / WHEELS)
    parser.add_argument("--python", default="3.12", help="version of Python there")
    options = parser.parse_args(argv)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", options.python, "--implementation", "cp", "--dest", str(options.folder)]
    command += [f"--platform={name}_x86_64" for name in PLATFORMS]
    command += ["--constraint", str(ROOT / "constraints.txt")]
    code = subprocess.run([*command, *PACKAGES]).returncode
    if code == 0:
        size = sum(file.stat().st_size for file in options.folder.glob("*.whl"))
        print(f"{options.folder}: {size / MIB:.1f} MiB")
    return code


def install(folder: Path, target: Path) -> list[str]:
    """Install into `target` those wheels of a folder whose packages are missing or older here; returns their names.

    Raises TransferError where pip fails.
    """
    chosen = [file for file in sorted(folder.glob("*.whl")) if _lacks(*file.name.split("-")[:2])]
    if chosen:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        done = subprocess.run([*command, "--target", str(target), *map(str, chosen)], capture_output=True, text=True)
        if done.returncode != 0:
            raise TransferError(f"pip cannot install {folder}: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
    return [file.name.split("-")[0] for file in chosen]


def _lacks(name: str, offered: str) -> bool:
    from packaging.version import Version

    if name.replace("_", "-").lower() in NEVER:
        return False
    try:
        return Version(version(name)) < Version(offered)
    except PackageNotFoundError:
        return True


def environment(folder: Path, interpret: bool) -> dict[str, str]:
    """The environment of the parts: the checkout, and the wheels that were missing, on their path.

    Raises TransferError where a wheel cannot be installed.
    """
    target = Path(tempfile.gettempdir()) / "linearize-gpu-site"
    if names := install(folder, target):
        print(f"installed from {folder}: {', '.join(names)}", file=sys.stderr, flush=True)
    path = [str(ROOT / "src"), str(ROOT), *[str(target)] * bool(names), *os.environ.get("PYTHONPATH", "").split(":")]
    new = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **new, **({"TRITON_INTERPRET": "1"} if interpret else {})}
