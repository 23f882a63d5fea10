"""The gate of every report: a model must give the same logits however a text comes to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linearize.errors import InputError, one_line
from linearize.evaluation.cache_checks import CHECKS, PADDED_STEPS, CacheProbe, Deviation, check
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, Stat
from linearize.evaluation.sections.consistency.numbers import ConsistencyNumbers, Failure, ModelChecks
from linearize.evaluation.sections.consistency.present import headline, present
from linearize.metrics.branches import longest_reach
from linearize.modeling import LinearizedForCausalLM

LEAST_TOKENS = 24  # of the longest text that is fed in several ways


class Consistency(Section):
    """Logits of one full forward pass against those of every other way that a text can take.

    `steps`: tokens decoded one by one, at least (a window is crossed in any case); `prefill`: tokens before them beyond
    the longest window.
    """

    NAME: ClassVar[str] = "consistency"
    TITLE: ClassVar[str] = "Is the cache right?"

    steps: int = Field(48, ge=8)
    prefill: int = Field(69, ge=3)

    def check(self, ctx: EvalContext) -> None:
        """Raises: InputError: too little text."""
        if (tokens := sum(map(len, ctx.documents))) < LEAST_TOKENS:
            raise InputError(f"the text has {tokens} tokens: checking the cache needs at least {LEAST_TOKENS}")

    def run(self, ctx: EvalContext) -> Numbers:
        """Every check that applies to a model, for every model, on the same tokens."""
        reach = max((longest_reach(c.plan) or 0 for c in ctx.models), default=0)
        rows, prefill = self._rows(ctx, reach)
        models: dict[str, ModelChecks] = {}
        for done, eval_model in enumerate(ctx.models):
            ctx.progress(f"cache of {eval_model.name}", done, len(ctx.models))
            key = {
                "section": self.NAME,
                "config": self.model_dump(),
                "model": [eval_model.name, eval_model.fingerprint],
                "rows": [row.tolist() for row in rows],
                "prefill": prefill,
                "seed": ctx.seed,
            }
            measure = partial(_measured, eval_model, rows, prefill, ctx.seed, ctx.one_per_row)
            models[eval_model.name] = ModelChecks.model_validate(ctx.results.result(key, measure))
        return ConsistencyNumbers(tokens=[len(row) for row in rows], prefill=prefill, models=models).to_json()

    def _rows(self, ctx: EvalContext, reach: int) -> tuple[list[Tensor], int]:
        """Texts of unequal odd lengths from the held-out text, end to end, and where decoding begins in the first."""
        stream = [token for document in ctx.documents for token in document.tokens]
        wanted = reach + self.prefill + max(self.steps, reach + 5)
        longest = min([wanted, ctx.length, len(stream), *map(_positions, ctx.models)])
        prefill = reach + self.prefill if longest == wanted else longest // 2
        lengths = [longest - (longest % 2 == 0), int(longest * 0.61) | 1, max(longest // 4, PADDED_STEPS + 1) | 1]
        rows, at = [], 0
        for length in lengths:
            at = at if at + length <= len(stream) else max(len(stream) - length, 0)
            rows.append(torch.tensor(stream[at : at + length]))
            at += length
        return rows, prefill | 1

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """Return a finding per model that fails, and a row per model and check."""
        return present(ConsistencyNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        """Return whether each student's cache is right."""
        return headline(ConsistencyNumbers.model_validate(numbers))


def _positions(eval_model: EvalModel) -> int:
    """Tokens that a model has positions for."""
    most = getattr(eval_model.model.config.get_text_config(), "max_position_embeddings", None)
    return int(most) if most else 2**31


def _measured(eval_model: EvalModel, rows: Sequence[Tensor], prefill: int, seed: int, one_per_row: bool) -> Numbers:
    probe = CacheProbe(eval_model.model.eval(), rows, prefill, seed=seed)
    left = {"static"} if isinstance(eval_model.model, LinearizedForCausalLM) else set()
    left |= {"packing"} if one_per_row else set()  # the family cannot, and is never asked to
    names = [name for name in CHECKS if name not in left]
    return ModelChecks(
        role=eval_model.role,
        reach=longest_reach(eval_model.plan) or 0,
        dtype=str(eval_model.model.dtype).removeprefix("torch."),
        checks={name: _checked(name, probe) for name in names},
    ).to_json()


def _checked(name: str, probe: CacheProbe) -> Deviation | Failure:
    """Return the deviation, or why there is none."""
    try:
        return check(name, probe)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        return Failure(error=f"{type(error).__name__}: {one_line(error)}")
