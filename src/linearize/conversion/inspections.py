"""`linearize inspect` with measurements on a teacher: how sensitive its layers are, and which heads look things up."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linearize.conversion.checks import check_starts, context_length, fit_length
from linearize.conversion.prepare import load_for_conversion
from linearize.conversion.request import data_specs
from linearize.conversion.source import teacher_source
from linearize.conversion.text import SENSITIVITY_TOKENS, read_text, sample_batches
from linearize.errors import InputError
from linearize.metrics.head_scores import HeadScores, head_scores
from linearize.metrics.plots import figure_files, new_figure
from linearize.metrics.sensitivity import layer_sensitivity
from linearize.recipes.schema import DEFAULT_RECIPE, Recipe, load_recipe

LOG = logging.getLogger("linearize")
LIKELY = 0.5  # probability of an answer below which a teacher does not look it up


def inspect_sensitivity(
    teacher: str,
    *,
    data: Sequence[str],
    recipe: str | Recipe = DEFAULT_RECIPE,
    tokens: int = SENSITIVITY_TOKENS,
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Measure what replacing each layer of a teacher alone by the recipe's mixer costs, on about `tokens` tokens.

    The text is the training part of the data, as where a conversion chooses its layers. The result is JSON; `layers`
    has one `LayerScore` per layer.

    Raises:
        InputError: a teacher, data or recipe that cannot be used.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if (mixer := chosen.plan.mixer) is None:
        raise InputError(f"recipe {chosen.name} has no plan.mixer to replace layers by: give another recipe")
    check_starts(chosen.plan)
    source = teacher_source(teacher, trust_remote_code=trust_remote_code, revision=revision, token=token)
    model, tokenizer = load_for_conversion(source, device, chosen.seed)
    chosen, notices = fit_length(chosen, context_length(model), ())
    text, _ = read_text(model, tokenizer, chosen.data, data_specs(data, chosen))
    for notice in notices:
        LOG.warning(notice)
    sample = sample_batches(chosen, text, model, tokens)
    scores = layer_sensitivity(model, mixer, sample)
    return {
        "model": teacher,
        "mixer": str(mixer.name),  # type: ignore[attr-defined]
        "tokens": sum(batch["input_ids"].numel() for batch in sample),
        "layers": [asdict(score) for score in scores],
    }


def inspect_heads(
    teacher: str,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Score each key/value group of a teacher by what an answer loses where the group sees a window alone; JSON-able.

    `heads` has one `HeadScore` per group, by rank. `plot`: a folder for `heads.svg` and `heads.png`.

    Raises:
        InputError: a teacher that cannot be used.
    """
    source = teacher_source(teacher, trust_remote_code=trust_remote_code, revision=revision, token=token)
    model, tokenizer = load_for_conversion(source, device, 0)
    scores = head_scores(model, tokenizer)
    if scores.answer < math.log(LIKELY):
        LOG.warning(
            "the teacher itself gives the answers a log-probability of %.2f nats only: scores of its heads say little",
            scores.answer,
        )
    if plot is not None:
        plot_heads(scores, plot)
    return {
        "model": teacher,
        "prompts": scores.prompts,
        "tokens": scores.tokens,
        "answer": scores.answer,
        "heads": [asdict(score) for score in scores.heads],
    }


def plot_heads(scores: HeadScores, folder: Path) -> list[Path]:
    """A map of the scores, layers across and groups down; files `heads.svg`, `heads.png`."""
    layers = sorted({score.layer for score in scores.heads})
    groups = 1 + max(score.group for score in scores.heads)
    fall = [[0.0] * len(layers) for _ in range(groups)]
    for score in scores.heads:
        fall[score.group][layers.index(score.layer)] = score.fall
    most = max(max(map(abs, row)) for row in fall) or 1.0
    with new_figure(folder / "heads", width=max(5.6, 1.8 + 0.28 * len(layers)), height=2.0 + 0.3 * groups) as (
        figure,
        (axis,),
    ):
        image = axis.imshow(fall, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
        axis.set_xticks(range(0, len(layers), 5), [str(layer) for layer in layers[::5]])
        axis.set_yticks(range(groups))
        axis.set(title="Fall of an answer's log-probability without a group", xlabel="layer", ylabel="key/value group")
        figure.colorbar(image, ax=axis, label="nats")
    return figure_files(folder, "heads")
