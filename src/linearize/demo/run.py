"""`linearize demo`: the embedded teacher converted with text that it writes itself, measured, and shown."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from linearize.conversion.api import convert
from linearize.decoding.generate import continue_text
from linearize.demo.show import LineOrBar, show_demo
from linearize.demo.text import KEPT, DemoText, write_text
from linearize.errors import InputError
from linearize.evaluation.recall import RecallReport, plot_recall, recall_beyond_window
from linearize.evaluation.speed import DecodeCost, decode_cost
from linearize.evaluation.speed.decode_cost import plot_decode_cost
from linearize.metrics.language_model import PositionBin
from linearize.metrics.plots import plot_loss_by_position, plot_stages
from linearize.metrics.report import ConversionReport, provenance, read_report
from linearize.modeling import load
from linearize.modeling.io.teacher import load_teacher
from linearize.ops.window_linear.spec import ring_slots
from linearize.recipes.schema import DEFAULT_RECIPE, Recipe, load_recipe
from linearize.storage.atomic import atomic_write_text, resumable_folder
from linearize.storage.files import expand_home
from linearize.tables import stdout_console
from linearize.version import __version__

TEACHER = Path(__file__).parent / "teacher"
DEFAULT_OUT = Path("linearize-demo")
MARK = "demo.json"
WINDOW = 16
TOKENS = 400_000  # over all stages, shared out as the recipe does
SEED = 0
PROMPT = "Once upon a time, there was a little girl named"
NEW_TOKENS = 60
CONTEXTS = (256, 1024, 4096, 8192)
DISTANCE_EDGES = (32, 128, 256, 1024)


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """All that the demo measured."""

    report: ConversionReport
    window: int
    recall: dict[str, RecallReport]
    prompt: str
    continuations: dict[str, str]
    costs: list[DecodeCost]
    text: DemoText
    seconds: dict[str, float]


def run_demo(*, out: str | Path = DEFAULT_OUT) -> DemoResult:
    """Convert the embedded teacher, measure teacher and student, print tables, and leave everything in `out`.

    An earlier demo at `out` is replaced once the new one is complete; stopped half-way, the next call goes on.

    Raises:
        InputError: `out` exists and is neither empty nor an earlier demo.
    """
    final = Path(expand_home(out))
    _check(final)
    console = stdout_console()
    with resumable_folder(final, __version__) as folder:
        result = _run(folder, console)
        _write(result, folder)
    show_demo(result, final, console)
    return result


def _check(final: Path) -> None:
    if final.is_dir() and any(final.iterdir()) and not (final / MARK).is_file():
        raise InputError(f"{final}: exists and is not an earlier demo; give another folder with --out")


def _run(folder: Path, console: Console) -> DemoResult:
    """The four parts, each timed."""
    torch.set_flush_denormal(True)
    clock = _Clock(console)
    teacher, tokenizer = load_teacher(TEACHER, dtype=torch.float32)
    teacher.generation_config.cache_implementation = "static"  # preallocated: a growing one copies itself every token
    recipe = demo_recipe()
    with clock.part("text", "1/4  the teacher writes the text"), _one_thread():
        text = write_text(teacher, tokenizer, folder, seed=SEED, progress=LineOrBar("writing").update)
    title = f"2/4  conversion with the recipe {recipe.name}, window {WINDOW}"
    with clock.part("conversion", title), contextlib.chdir(folder):  # the report then names the text as `text/...`
        if not Path("student").is_dir() or Path(".student.run").exists():  # else: of a run that was stopped later on
            convert(TEACHER, data=text.files, out="student", recipe=recipe)
        student = load("student")
    report = read_report(folder / "student")
    assert report is not None
    models = {"teacher": teacher, "student": student}
    with clock.part("recall", f"3/4  {len(text.questions)} questions about facts beyond the window"):
        recall = {
            name: recall_beyond_window(model, tokenizer, text.questions, distance_edges=DISTANCE_EDGES)
            for name, model in models.items()
        }
        continuations = {
            name: continue_text(model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS) for name, model in models.items()
        }
    with clock.part("decode", "4/4  decode time and cache against context"):
        costs = decode_cost(student, teacher, contexts=CONTEXTS, repeats=3)
    return DemoResult(
        report=report, window=reach(recipe), recall=recall, prompt=PROMPT, continuations=continuations, costs=costs,
        text=text, seconds=clock.seconds,
    )  # fmt: skip


def demo_recipe() -> Recipe:
    """The default recipe, cut down to a short window, short rows and few tokens."""
    recipe = load_recipe(DEFAULT_RECIPE)
    total = sum(stage.tokens for stage in recipe.stages)
    settings: dict[str, Any] = {
        "plan.mixer.window": WINDOW,
        "data.length": 512,
        "data.keep_whole": True,
        "data.heldout": 0.1,
        "data.max_heldout_tokens": 8_000,
        "seed": SEED,
    }
    for number, stage in enumerate(recipe.stages):
        settings |= {
            f"stages.{number}.tokens": round(TOKENS * stage.tokens / total),
            f"stages.{number}.evaluate_every": 0.25,
        }
    return recipe.override(settings)


def reach(recipe: Recipe) -> int:
    """Tokens that a query's window can hold, itself included."""
    mixer: Any = recipe.plan.mixer
    return ring_slots(mixer.window, mixer.window_shape) + 1


def _write(result: DemoResult, folder: Path) -> None:
    """`demo.json` and the plots; what was kept for an interruption goes."""
    shutil.rmtree(folder / KEPT, ignore_errors=True)
    plots = folder / "plots"
    plot_stages(result.report, plots)
    plot_loss_by_position([PositionBin(**b) for b in result.report.held_out["by_position"]], plots)
    plot_recall(result.recall, plots)
    plot_decode_cost(result.costs, plots)
    document = {
        "report": result.report.to_dict(),
        "window": result.window,
        "recall": {name: report.to_dict() for name, report in result.recall.items()},
        "continuations": result.continuations,
        "decode_cost": [cost.to_dict() for cost in result.costs],
        "text": {"files": result.text.files, "stories": result.text.num_stories, "recall": result.text.num_recall},
        "seconds": result.seconds,
        "provenance": provenance(seed=SEED),
    }
    atomic_write_text(folder / MARK, json.dumps(document, indent=2) + "\n")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A token at a time is too little work to share: a second thread gains nothing, and on a busy machine it waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Clock:
    """Prints which part begins, and keeps how long each took."""

    def __init__(self, console: Console) -> None:
        self.console, self.seconds = console, {}  # type: tuple[Console, dict[str, float]]

    @contextlib.contextmanager
    def part(self, name: str, title: str) -> Iterator[None]:
        """One part of the demo."""
        self.console.print(title)
        self.console.file.flush()  # before what is printed on stderr
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
