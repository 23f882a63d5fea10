"""Conversions for docs/results.md: every row is one of these runs; `hybrid_results.py` makes tables and plots of them.

python scripts/hybrid_runs.py stories --teacher TEACHER --data FILE   (of stories260k and TinyStories' train_a.txt)
python scripts/hybrid_runs.py embedded

Each run is `linearize convert` with the recipe and overrides that its JSON in benchmarks/hybrids/ names. Runs that have
one already are skipped, so that the command continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import linearize
from linearize.demo.run import TEACHER
from linearize.demo.text import DemoText, write_text
from linearize.evaluation.recall import recall_beyond_window
from linearize.metrics.report import read_report
from linearize.modeling.io.teacher import load_teacher
from linearize.recipes.schema import load_recipe
from linearize.storage.atomic import atomic_write_text

OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "hybrids"
REACH = 32  # tokens: facts nearer than this are not counted in the recall of the embedded teacher


@dataclass(frozen=True, kw_only=True)
class Run:
    """One conversion: its recipe (in benchmarks/hybrids/) and the keys changed in it."""

    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)


def aligned(**settings: Any) -> Run:
    """Alignment, then distillation; 500k tokens."""
    return Run(recipe="align-distill", settings=dotted(settings))


def shorter(**settings: Any) -> Run:
    """As `aligned`, with 300k tokens."""
    return aligned(**settings, stages__0__tokens="100k", stages__1__tokens="200k")


def distilled(**settings: Any) -> Run:
    """Distillation alone; 120k tokens."""
    return Run(recipe="distill", settings=dotted(settings))


def dotted(settings: dict[str, Any]) -> dict[str, Any]:
    """`mixer=`, `keep=` and `stages__0__kl=` as a recipe's keys."""
    short = {"mixer": "plan.mixer.name", "initialise": "plan.mixer.initialise", "keep": "plan.layers.keep"}
    return {short.get(key, key.replace("__", ".")): value for key, value in settings.items()}


RATIOS = {"50": 0.5, "25": 0.25, "0": 0}
BEST = {"mamba2": "calibrate", "mamba": "copy", "gated_delta_net": "calibrate"}  # mamba cannot be calibrated
STORIES = {
    **{f"mamba2-{kept}": aligned(mixer="mamba2", initialise="calibrate", keep=keep) for kept, keep in RATIOS.items()},
    **{f"mamba-{kept}": shorter(mixer="mamba", keep=keep) for kept, keep in RATIOS.items()},
    "mamba-50-2M": aligned(mixer="mamba", keep=0.5, stages__0__tokens="500k", stages__1__tokens="1500k"),
    "mamba2-0-1M": aligned(
        mixer="mamba2", initialise="calibrate", keep=0, stages__0__tokens="300k", stages__1__tokens="700k"
    ),
    "mamba2-50-4M": aligned(
        mixer="mamba2",
        initialise="calibrate",
        keep=0.5,
        stages__0__tokens="1M",
        stages__1__tokens="3M",
    ),
    **{
        f"start-mamba2-{start}": distilled(mixer="mamba2", initialise=start)
        for start in ("copy", "calibrate", "random")
    },
    **{
        f"start-gated_delta_net-{start}": distilled(mixer="gated_delta_net", initialise=start)
        for start in ("copy", "calibrate", "random")
    },
    **{f"start-mamba-{start}": distilled(mixer="mamba", initialise=start) for start in ("copy", "random")},
    "loss-ce": distilled(stages__0__kl=0.0, stages__0__ce=1.0),
    "loss-kl+ce": distilled(stages__0__kl=0.1, stages__0__ce=1.0),
    "schedule-at-once": distilled(keep=0.25),
    "schedule-progressive": distilled(keep=0.25, plan__schedule={"kind": "progressive", "replaced": [0.25, 0.5, 0.75]}),
    "schedule-stepwise": distilled(keep=0.25, plan__schedule={"kind": "stepwise", "order": "first_to_last"}),
    "selected-25": distilled(keep=0.25, plan__layers__select="sensitivity"),
    "selected-50": distilled(keep=0.5, plan__layers__select="sensitivity"),
    **{
        f"gated_delta_net-{kept}": aligned(mixer="gated_delta_net", initialise="calibrate", keep=keep)
        for kept, keep in RATIOS.items()
    },
}
EMBEDDED = {
    f"{mixer}-{kept}": shorter(mixer=mixer, initialise=BEST[mixer], keep=keep, data__length=512, data__keep_whole=True)
    for mixer in ("mamba2", "mamba", "gated_delta_net")
    for kept, keep in RATIOS.items()
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the runs of one table that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["stories", "embedded"])
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--data", type=Path, action="append")
    parser.add_argument("--only", nargs="*", help="these runs, in this order")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = STORIES if options.table == "stories" else EMBEDDED
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as scratch:
        text = None
        for name in options.only or runs:
            result = OUT / options.table / f"{name}.json"
            if result.is_file():
                continue
            if options.table == "embedded" and text is None:
                text = write_demo_text(Path(scratch))
            convert(
                runs[name],
                options.teacher,
                options.data or text_files(text, Path(scratch)),
                Path(scratch) / name,
                text,
                result,
                options.seed,
            )


def write_demo_text(folder: Path) -> DemoText:
    """Stories and recall documents that the embedded teacher writes, as in the demo, with the questions about them."""
    teacher, tokenizer = load_teacher(TEACHER, dtype=torch.float32)
    return write_text(teacher, tokenizer, folder, seed=0)


def text_files(text: DemoText | None, folder: Path) -> list[Path]:
    """The demo's text as data."""
    assert text is not None, "the runs on stories260k need --data"
    return [folder / name for name in text.files]


def convert(
    run: Run, teacher: Path, data: Sequence[Path], out: Path, text: DemoText | None, result: Path, seed: int
) -> None:
    """One conversion, measured; its report goes into `result`."""
    settings = {**run.settings, "seed": seed}
    student = linearize.convert(
        teacher, data=data, out=out, recipe=load_recipe(OUT / f"{run.recipe}.yaml"), overrides=settings
    )
    report = read_report(out)
    assert report is not None
    report_data = report.to_dict()
    if text is not None:  # written into a scratch folder, so its path says nothing
        report_data |= {"teacher": "linearize/demo/teacher", "data": [f"text/{path.name}" for path in data]}
    plan = [None if mixer is None else mixer["name"] for mixer in student.config.plan]
    document = {"run": asdict(run), "seed": seed, "plan": plan, "report": report_data}
    if text is not None:
        document["recall"] = recall(student, text)
    shutil.rmtree(out)
    result.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(result, json.dumps(document, indent=1) + "\n")


def recall(student: Any, text: DemoText) -> dict[str, Any]:
    """Exact-match accuracy by distance, without the single answers."""
    _, tokenizer = load_teacher(TEACHER)
    result = recall_beyond_window(student, tokenizer, text.questions, distance_edges=(REACH, 128, 256, 1024)).to_dict()
    return {key: result[key] for key in ("items", "accuracy", "by_distance")}


if __name__ == "__main__":
    main()
