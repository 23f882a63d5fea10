"""Conversions by torchrun with one, two and four processes: losses, a rank killed on the way, memory of each process.

`python -m benchmarks.many_processes --out benchmarks/many_processes.json`. Gloo on the CPU; a real cluster is
not needed, since what is shown are equalities and ratios.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from benchmarks.timing import SEED, parser, publish, random_llama

STEPS, BATCH, LENGTH = 50, 4, 64
PARTS = ("losses", "kills", "memory")
MARGINS = "rewards/margins"
COMMON = {"tokens": STEPS * BATCH * LENGTH, "batch": BATCH, "evaluate_every": 10, "precision": "fp32"}
OWN_ROWS = {key: value for key, value in COMMON.items() if key != "tokens"} | {
    "max_steps": STEPS, "epochs": STEPS, "length": LENGTH, "lr": 1e-4, "micro_batch": 1
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "between": {
        "plan": {"mixer": {"name": "lolcats", "window": 8, "feature_dim": 16}},
        "stages": [
            {"name": "attention_transfer", "lr": 1e-3, **COMMON},
            {"name": "lowrank", "lr": 1e-3, "train_mixers": True, "micro_batch": 1, **COMMON},
        ],
    },
    "whole": {
        "plan": {"mixer": {"name": "mamba2"}},
        "stages": [
            {"name": "matrix_alignment", "lr": 1e-3, **COMMON},
            {"name": "hidden_alignment", "lr": 1e-4, **COMMON},
            {"name": "distill", "lr": 1e-4, "train": "all", "kl": 1.0, "micro_batch": 1, **COMMON},
        ],
    },
    "aligned": {
        "plan": {"mixer": {"name": "lolcats", "window": 8, "feature_dim": 16}},
        "stages": [
            {"name": "sft", "data": "answers.json", **OWN_ROWS},
            {"name": "dpo", "data": "pairs.json", **OWN_ROWS},
        ],
    },
}


def command(teacher: Path, recipe: Path, out: Path, ranks: int) -> list[str]:
    """The conversion as a person would start it; one process without torchrun."""
    data = ["--data", "self", "--set", "data.self_tokens=20000", "--recipe", str(recipe), "--device", "cpu"]
    convert = ["-m", "linearize", "convert", str(teacher), *data, "--out", str(out)]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(many if ranks > 1 else []), *convert]


def write_recipe(folder: Path, name: str) -> Path:
    """A recipe's file, and the rows that its stages read."""
    fixed = {"description": "Benchmark.", "source": "None.", "data": {"length": LENGTH, "heldout": 8}}
    stages = [dict(stage) for stage in RECIPES[name]["stages"]]
    for stage in stages:
        if "data" in stage:
            stage["data"] = str(folder / stage["data"])
            Path(stage["data"]).write_text(json.dumps(rows_of(stage["name"])), encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(fixed | RECIPES[name] | {"stages": stages}), encoding="utf-8")
    return path


def rows_of(stage: str) -> list[dict[str, str]]:
    """37 questions with an answer, or with a better and a worse one; of unequal lengths."""
    names = ("Tom", "Lily", "a big red dog", "Mum", "the cat")
    results = []
    for number in range(37):
        who, other = names[number % 5], names[(number + 1 + number % 3) % 5]
        good = f" {who} went to play with {other}." + " They had fun." * (number % 4)
        row = {"prompt": f"What did {who} do on day {number}?", "chosen": good, "rejected": f" {number} {other}!"}
        results.append(row if stage == "dpo" else {"prompt": row["prompt"], "completion": good})
    return results


def compared(one: Path, other: Path) -> dict[str, float]:
    """The largest difference of a loss (training and held-out, over all steps), by stage, of a margin, and of a
    weight."""
    from safetensors.torch import load_file

    reports = [json.loads((path / "report.json").read_text(encoding="utf-8")) for path in (one, other)]
    results: dict[str, float] = {}
    for x, y in zip(*(report["stages"] for report in reports), strict=True):
        pairs = [
            pair for kind in ("losses", "heldout") for pair in zip(x["details"][kind], y["details"][kind], strict=True)
        ]
        results[x["name"]] = max(abs(first[1] - second[1]) for first, second in pairs)
        metrics = [stage["details"].get("metrics", {}).get(MARGINS) for stage in (x, y)]
        if all(metrics):
            results[MARGINS] = max(abs(first[1] - second[1]) for first, second in zip(*metrics, strict=True))
            results["largest margin"] = max(value for _, value in metrics[0])
    weights, others = (load_file(path / "model.safetensors") for path in (one, other))
    results["weights"] = max(float((weights[key] - others[key]).abs().max()) for key in weights)
    return results


def run(words: Sequence[str], *, kill_after: int | None = None) -> tuple[int, int | None]:
    """Exit code, and at which logged step a rank was killed: one at random, once `kill_after` steps were logged."""
    out = Path(words[words.index("--out") + 1])
    log = out.parent / f".{out.name}.run" / "log" / "training.jsonl"
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed: int | None = None
    while process.poll() is None:
        time.sleep(0.02)
        if kill_after is not None and killed is None and log.exists():
            steps = log.read_bytes().count(b'"loss"')
            if steps >= kill_after and ranks_of(words, process.pid):
                os.kill(random.choice(ranks_of(words, process.pid)), signal.SIGKILL)
                killed = steps
    return process.returncode, killed


def ranks_of(words: Sequence[str], parent: int) -> list[int]:
    """The process itself, or under torchrun the processes that it started."""
    if "torch.distributed.run" not in words:
        return [parent]
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="utf-8").split()]


def kill_and_rerun(teacher: Path, recipe: Path, folder: Path, ranks: int, kills: Sequence[int]) -> dict[str, Any]:
    """A conversion with killed ranks, started again each time, compared with the uninterrupted one of `folder`."""
    out = folder / f"{recipe.stem}-{ranks}-killed"
    words, struck, seconds = command(teacher, recipe, out, ranks), [], []
    for after in kills:
        begun = time.monotonic()
        code, killed = run(words, kill_after=after)
        assert code != 0 and killed is not None, "the run was over before a rank was killed"
        struck.append(killed)
        seconds.append(round(time.monotonic() - begun, 1))
    assert run(words)[0] == 0
    result = compared(folder / f"{recipe.stem}-{ranks}", out)
    return {"recipe": recipe.stem, "ranks": ranks, "killed_after_steps": struck, **result}


def peak_memory(folder: Path, ranks: int, *, layers: int = 12) -> dict[str, Any]:
    """Peak resident memory of each rank over that of a small model, in sizes of the weights; rows are short, since what
    is asked for is weights and not activations."""
    recipe = write_recipe(folder, "between")
    peaks = {}
    for name, depth in (("small", 1), ("large", layers)):
        teacher = folder / f"{name}-teacher"
        model = random_llama(hidden=512, layers=depth, heads=8, kv_heads=4, context=64, vocab=2048)
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(teacher)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (teacher / file).write_bytes(files("linearize.demo").joinpath("teacher", file).read_bytes())
        text = folder / "text.txt"
        text.write_text("\n\n".join(f"Once there were {i} cats. They sat on a mat." for i in range(200)), "utf-8")
        words = command(teacher, recipe, folder / f"{name}-{ranks}-memory", ranks)
        words[words.index("self")] = str(text)
        words += ["--set", "data.length=16", "--set", "stages.0.tokens=192", "--set", "stages.1.tokens=192"]
        peaks[name] = (size, measured(words))
    weights = peaks["large"][0] - peaks["small"][0]
    above = [peak - base for peak, base in zip(peaks["large"][1], peaks["small"][1], strict=True)]
    return {"ranks": ranks, "weights_bytes": weights, "peaks_over_weights": [round(x / weights, 3) for x in above]}


def measured(words: Sequence[str]) -> list[int]:
    """Peak resident bytes of each rank of a command, the first rank first."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        time.sleep(0.01)
        for rank in ranks_of(words, process.pid):
            try:
                status = Path(f"/proc/{rank}/status").read_text(encoding="utf-8")
            except OSError:
                continue
            for line in status.splitlines():
                if line.startswith("VmHWM"):
                    peaks[rank] = int(line.split()[1]) * 1024
    assert process.returncode == 0, "the conversion failed"
    return [peaks[rank] for rank in sorted(peaks)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    chosen = options.parse_args(arguments)
    random.seed(SEED)
    rows: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, teacher = Path(name), Path(str(files("linearize.demo").joinpath("teacher")))
        recipes = [write_recipe(folder, recipe) for recipe in chosen.recipes]
        for recipe in recipes if {"losses", "kills"} & set(chosen.parts) else ():
            for ranks in (1, *chosen.ranks):
                out = folder / f"{recipe.stem}-{ranks}"
                assert run(command(teacher, recipe, out, ranks))[0] == 0, "the conversion failed"
                if ranks > 1:
                    result = compared(folder / f"{recipe.stem}-1", out)
                    rows.append({"part": "losses", "recipe": recipe.stem, "ranks": ranks, **result})
            for ranks in (1, chosen.ranks[0]) if "kills" in chosen.parts else ():
                kills = sorted(random.sample(range(1, 45 * len(RECIPES[recipe.stem]["stages"])), 2))
                rows.append({"part": "kills", **kill_and_rerun(teacher, recipe, folder, ranks, kills)})
        for ranks in (1, *chosen.ranks) if "memory" in chosen.parts else ():
            rows.append({"part": "memory", **peak_memory(folder, ranks)})
    setting = {
        "steps": STEPS,
        "batch": BATCH,
        "length": LENGTH,
        "teacher": "embedded",
        "backend": "gloo",
        "dtype": "fp32",
    }
    publish("losses of one process to 1e-5; killed and rerun equal to unbroken", setting, rows, chosen.out)


if __name__ == "__main__":
    main()
