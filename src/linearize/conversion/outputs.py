"""The student's folder: what it holds besides weights, and how it gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.conversion.request import ConversionRequest
from linearize.conversion.work_folder import mark_ended
from linearize.metrics.card import model_card
from linearize.metrics.plots import plot_layer_error, plot_stages
from linearize.metrics.report import ConversionReport, write_report
from linearize.modeling.export.remote_code import add_code
from linearize.modeling.io.adapter_folder import is_adapter_folder
from linearize.recipes.schema import Recipe
from linearize.storage.atomic import atomic_folder
from linearize.training.distributed import Group


def write_student_files(report: ConversionReport, recipe: Recipe, config: Mapping[str, Any], folder: Path) -> None:
    """Write recipe, report, plots and model card; `config` is the student's `config.json`."""
    text = recipe.to_yaml()
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    write_report(report, folder)
    card = model_card(report, text, config, adapter_only=is_adapter_folder(folder))
    (folder / "README.md").write_text(card, encoding="utf-8")
    plot_stages(report, folder / "plots")
    if report.layer_error:
        converted = [layer for layer, mixer in enumerate(report.mixers) if mixer is not None]
        plot_layer_error(report.layer_error, folder / "plots", converted)


@contextmanager
def student_folder(request: ConversionRequest, group: Group) -> Iterator[Path | None]:
    """Yield the folder to write the student into; it gets its name, with the log inside, when the block ends.

    Only the first process writes; the others get None.
    """
    if not group.leads:
        yield None
        return
    with atomic_folder(request.final, request.overwrite, locked=True) as folder:
        yield folder
        if (request.work / "log").is_dir():
            shutil.copytree(request.work / "log", folder / "log")
        if request.self_contained:
            add_code(folder)
        mark_ended(folder, request.work, request.identity)
