"""Convert one teacher with every recipe at a small budget and write the losses, so that two versions can be compared.

    python -m benchmarks.recipe_losses --teacher DIR --data FILE --out losses.json [--against before.json]

Losses are in nats per token. With `--against`, prints the largest difference for each recipe.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import linearize
from linearize.recipes import recipe_names

LOSSES = ("teacher_loss", "swap_loss", "student_loss", "student_kl", "student_top1")


def losses(name: str, teacher: Path, data: Path, tokens: int, length: int) -> dict[str, Any]:
    """Swap, stage and final losses of one conversion."""
    recipe = linearize.load_recipe(name)
    overrides: dict[str, Any] = {"data.length": length, "data.heldout": 4096}
    for i, stage in enumerate(recipe.stages):
        if stage.tokens != 0 and not hasattr(stage, "epochs"):
            overrides[f"stages.{i}.tokens"] = tokens
            overrides[f"stages.{i}.batch"] = 4
            if getattr(stage, "length", None):
                overrides[f"stages.{i}.length"] = length
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "student"
        linearize.convert(teacher, recipe=name, data=[data], out=out, overrides=overrides)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    results = {key: report[key] for key in LOSSES}
    results["stages"] = [[stage["name"], stage["loss_before"], stage["loss_after"]] for stage in report["stages"]]
    return results


def numbers(entry: Any) -> list[float]:
    """All numbers of an entry, in order."""
    if isinstance(entry, dict):
        return [x for value in entry.values() for x in numbers(value)]
    if isinstance(entry, list):
        return [x for value in entry for x in numbers(value)]
    return [float(entry)] if isinstance(entry, float | int) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--recipes", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    before = json.loads(options.against.read_text()) if options.against else {}
    results: dict[str, Any] = {}
    for name in options.recipes or recipe_names():
        start = time.perf_counter()
        results[name] = losses(name, options.teacher, options.data, options.tokens, options.length)
        options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
        line = f"{name}: {time.perf_counter() - start:.0f} s, student loss {results[name]['student_loss']:.6f}"
        if name in before:
            pairs = zip(numbers(results[name]), numbers(before[name]), strict=True)
            line += f", largest difference {max(abs(a - b) for a, b in pairs):.2e}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
