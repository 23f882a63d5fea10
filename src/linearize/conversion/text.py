"""The text of a conversion: read, split into training and held-out documents, and packed into rows."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from linearize.modeling.probe import keeps_documents_apart
from linearize.phases import phase
from linearize.recipes.schema import Recipe
from linearize.training.config import Batch
from linearize.training.data.loading import (
    DataConfig,
    document_rows,
    load_documents,
    short_documents,
    shortened,
    split,
)
from linearize.training.data.mixture import shares, weighted
from linearize.training.data.pseudo_labels import pseudo_labeller
from linearize.training.data.sampling import self_sampler
from linearize.training.data.token_cache import token_cache
from linearize.training.data.train_dataset import TrainDataset

CALIBRATION_TOKENS = 16_384
MIN_MEASURED_TOKENS = 256
TRAINED_PER_MEASURED = 64
"""Trained tokens of a stage per measured token: measuring, about 30 passes, is then a tenth of two stages' work."""
FREE_PARAMETER_TOKENS = 2.5e9
"""Measured tokens times parameters whose 30 passes take a few seconds anywhere, however short the training."""
MAX_CPU_PARAMETER_TOKENS = 3e11
"""Measured tokens times parameters that two cores measure in about 20 seconds, so that training begins soon."""
EVALUATION_BATCH = 8
SENSITIVITY_TOKENS = 16_384
LOG = logging.getLogger("linearize")


def measured_tokens(recipe: Recipe, parameters: int, device: str) -> int:
    """Tokens to measure at most: what the recipe says, else what follows from the tokens that its stages train on.

    `parameters`: of the teacher. `device`: the type of the device that measures, as `cpu`.
    """
    if recipe.data.measured_tokens is not None:
        return recipe.data.measured_tokens
    trained = max((stage.tokens or 0 for stage in recipe.stages), default=0)
    tokens = max(trained / TRAINED_PER_MEASURED, FREE_PARAMETER_TOKENS / parameters, MIN_MEASURED_TOKENS)
    if device == "cpu":
        tokens = min(tokens, max(MAX_CPU_PARAMETER_TOKENS / parameters, MIN_MEASURED_TOKENS))
    return round(min(tokens, recipe.data.max_heldout_tokens))


def with_measured_tokens(recipe: Recipe, teacher: nn.Module, device: torch.device) -> Recipe:
    """The recipe with `data.measured_tokens` as a number; `device`: what measures.

    Warns where held-out text shorter than a row would decide which weights of a stage are kept.
    """
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    tokens = measured_tokens(recipe, parameters, device.type)
    lengths = [stage.length or recipe.data.length for stage in recipe.stages if stage.tokens and stage.keep_best]
    if recipe.data.measured_tokens is None and tokens < max(lengths, default=0):
        LOG.warning(
            f"the weights kept are those best on {tokens:,} held-out tokens, less than a row of {max(lengths):,}: what "
            "is learned far into a row does not count; set data.measured_tokens, or keep_best=false in each stage"
        )
    return recipe.override({"data.measured_tokens": tokens})


def read_text(
    teacher: Any,
    tokenizer: Any,
    data: DataConfig,
    specs: Sequence[str],
    device: torch.device | None = None,
    *,
    packs: Callable[[], bool] | None = None,
) -> tuple[TrainDataset, list[Batch]]:
    """The text to train on, and the held-out batches on `device` (None: the teacher's).

    `packs`: whether the teacher keeps the documents of a packed row apart (None: try it); where it does not, each
    row holds one document.
    """
    documents = load_documents(
        specs,
        tokenizer,
        sample=self_sampler(teacher, tokenizer, data, progress=_printer("written {done:,} of {all:,} tokens")),
        answer=pseudo_labeller(teacher, tokenizer, data, progress=_printer("answered {done:,} of {all:,} prompts")),
        answer_only=data.answer_only,
        whole_files=data.whole_files,
        cache=token_cache(),
        say=_say,
    )
    for line in short_documents(documents, data.length):
        LOG.warning(line)
    parts = split(documents, data)
    train = parts.train
    if data.weights is not None:
        train = weighted(parts.train, data.weights, data.seed)
        _say(shares(train, parts.train))
    heldout = shortened(parts.heldout, data.measured_tokens or data.max_heldout_tokens, data.length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    alone = not (keeps_documents_apart(teacher) if packs is None else packs())
    if alone:
        LOG.warning(
            f"{teacher.config.model_type} does not keep the documents of a packed row apart: each row holds one "
            "document and padding, so that long documents or a smaller data.length train faster"
        )
    text = TrainDataset(documents=train, pad_token_id=pad, keep_whole=data.keep_whole, one_per_row=alone)
    with phase("packing the text into rows"):
        text.rows(data.length)
        rows = document_rows(heldout, data.length, pad_token_id=pad, one_per_row=alone)
    return text, [
        {k: x.to(device or teacher.device) for k, x in batch.items()} for batch in rows.in_order(EVALUATION_BATCH)
    ]


def calibration_batches(recipe: Recipe, text: TrainDataset, device: torch.device | str = "cpu") -> list[Batch]:
    """Batches of the training text that mixers are calibrated on: as many tokens as are measured, or one row."""
    tokens = min(CALIBRATION_TOKENS, max(recipe.data.measured_tokens or 0, recipe.data.length))
    return text.sample(recipe.data.length, tokens, EVALUATION_BATCH, device)


def sample_batches(recipe: Recipe, text: TrainDataset, teacher: Any, tokens: int) -> list[Batch]:
    """Batches of about so many tokens of the training text, on the teacher's device."""
    return text.sample(recipe.data.length, tokens, EVALUATION_BATCH, teacher.device)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _printer(line: str) -> Callable[[int, int], None]:
    """Print a line on stderr for every tenth of the text that is sampled from the teacher."""
    printed = 0

    def report(done: int, total: int) -> None:
        nonlocal printed
        if (tenth := done * 10 // max(total, 1)) > printed:
            printed = tenth
            print(f"linearize: the teacher has {line.format(done=done, all=total)}", file=sys.stderr, flush=True)

    return report
