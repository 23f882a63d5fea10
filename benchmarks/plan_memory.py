"""`linearize plan` compared with real processes: the planned peak on this CPU, and VmHWM of a conversion.

Each conversion runs in a process of its own, a random Llama on random words for two steps a stage. `baseline` is the
resident memory of such a process with everything imported and nothing loaded; the ratio that counts is that of what
stands above it (`ratio`), `ratio_with_baseline` is that of the whole.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import parser, publish, random_llama

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lolcats, transfer": ("lolcats", {"stages.0.batch": 4, "stages.1.tokens": 0}),
    "lolcats, LoRA": ("lolcats", {"stages.0.tokens": 0, "stages.1.batch": 4}),
    "mamba2 in every second layer, hidden states": (
        "mohawk",
        {"plan.layers": "[0,2,4,6]", "stages.0.tokens": 0, "stages.1.batch": 4, "stages.2.tokens": 0},
    ),
}
LENGTH = 256
_CHILD = """
import json, sys
from pathlib import Path
def held(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
import datasets, matplotlib.pyplot, peft
import linearize.conversion.api
from linearize.cli.main import main
baseline = held("VmRSS")
code = main(sys.argv[1:])
print(json.dumps({"code": code, "baseline": baseline, "peak": held("VmHWM")}))
"""


def measure(name: str, folder: Path, teacher: Path, text: Path) -> dict[str, Any]:
    """One case: the planned and the measured peak."""
    recipe, settings = CASES[name]
    settings = {"data.length": LENGTH, "data.max_heldout_tokens": 8 * LENGTH, **settings}
    for stage in (0, 1, 2)[: 3 if recipe == "mohawk" else 2]:
        tokens = f"stages.{stage}.tokens"
        if tokens not in settings:
            settings[tokens] = 2 * LENGTH * settings[f"stages.{stage}.batch"]
    chosen = ["--recipe", recipe, *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]
    asked = [sys.executable, "-m", "linearize", "plan", str(teacher), "--device", "cpu", "--json", *chosen]
    plan = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    arguments = ["convert", str(teacher), "--data", str(text), "--out", str(folder / "student"), *chosen]
    done = subprocess.run([sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"code": done.returncode}
    if result["code"] != 0:
        raise RuntimeError(f"{name}: the conversion failed: {done.stderr[-2000:]}")
    reserve = plan["reserve_bytes"]
    planned, measured = plan["peak_bytes"] - reserve, result["peak"] - result["baseline"]
    return {
        "case": name,
        "settings": settings,
        "stages": {stage["stage"]: stage["peak_bytes"] - reserve for stage in plan["stages"]},
        "measuring": plan["measuring_bytes"] - reserve,
        "loading": plan["loading_bytes"] - reserve,
        "planned": planned,
        "measured": measured,
        "baseline": result["baseline"],
        "ratio": round(planned / measured, 3),
        "ratio_with_baseline": round((planned + result["baseline"]) / result["peak"], 3),
    }


def main() -> None:
    """Measure all cases and write the JSON."""
    arguments = parser(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher, text = prepare(folder)
        rows: list[dict[str, Any]] = []
        for name in CASES:
            place = folder / str(len(rows))
            place.mkdir()
            rows.append(measure(name, place, teacher, text))
            print(rows[-1], flush=True)
    publish("peak memory of conversions, planned and measured", {"length": LENGTH}, rows, arguments.out)


def prepare(folder: Path) -> tuple[Path, Path]:
    """A random Llama of 26M parameters with the demo's tokenizer, and a text of random words."""
    from importlib.resources import files

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(files("linearize.demo") / "teacher"))
    teacher = random_llama(hidden=512, layers=8, heads=8, kv_heads=4, context=2 * LENGTH, vocab=len(tokenizer))
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(500)]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=600))}) for _ in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "teacher", folder / "text.jsonl"


if __name__ == "__main__":
    main()
