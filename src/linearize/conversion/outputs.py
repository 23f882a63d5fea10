"""What lies in a student's folder besides its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.metrics.card import model_card
from linearize.metrics.plots import plot_layer_error, plot_stages
from linearize.metrics.report import ConversionReport, write_report
from linearize.recipes.recipe import Recipe


def write_papers(report: ConversionReport, recipe: Recipe, config: Mapping[str, Any], folder: Path) -> None:
    """Recipe, report, plots and model card; `config`: the student's `config.json`."""
    text = recipe.to_yaml()
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    write_report(report, folder)
    (folder / "README.md").write_text(model_card(report, text, config), encoding="utf-8")
    plot_stages(report, folder / "plots")
    if report.layer_error:
        converted = [layer for layer, mixer in enumerate(report.mixers) if mixer is not None]
        plot_layer_error(report.layer_error, folder / "plots", converted)
