"""An exported folder as a GGUF file, by the converter in a person's own checkout of llama.cpp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from linearize.errors import InputError
from linearize.storage.files import expand_home

VARIABLE = "LINEARIZE_LLAMA_CPP"
SCRIPT = "convert_hf_to_gguf.py"
TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def to_gguf(folder: Path, out: Path, dtype: str) -> None:
    """Convert a folder, without the layers for multi-token prediction that no export has.

    Raises:
        InputError: no converter, or one that does not take the folder.
    """
    checkout = os.environ.get(VARIABLE)
    if not checkout:
        raise InputError(f"llama.cpp reads GGUF files: set {VARIABLE} to a checkout of it, whose {SCRIPT} writes them")
    script = Path(expand_home(checkout)) / SCRIPT
    if not script.is_file():
        raise InputError(f"{VARIABLE} is {checkout}, which has no {SCRIPT}: give a checkout of llama.cpp")
    command = [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", TYPES[dtype]]
    if json.loads((folder / "config.json").read_text("utf-8")).get("model_type", "").startswith("qwen3_5"):
        command.append("--no-mtp")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not out.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise InputError(f"{SCRIPT} does not take {folder}: {lines[-1] if lines else f'exit code {done.returncode}'}")
