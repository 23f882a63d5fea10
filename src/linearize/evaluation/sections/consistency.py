"""The gate of every report: a model must give the same logits however a text is fed to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linearize.errors import one_line
from linearize.evaluation.cache_checks import CHECKS, PADDED_STEPS, CacheProbe, Deviation, check, tolerance
from linearize.evaluation.context import (
    Cell,
    EvalContext,
    EvalModel,
    Finding,
    Numbers,
    Section,
    SectionView,
    Stat,
    Table,
    TooLittleTextError,
)
from linearize.evaluation.numbers import NumbersModel, Role
from linearize.metrics.branches import longest_reach
from linearize.modeling import LinearizedForCausalLM

LEAST_TOKENS = 24  # of the longest text that is fed in several ways
WORDS = {
    "decode": "token by token through the cache",
    "chunks": "prefill in uneven chunks",
    "padding": "a left-padded batch of unequal texts",
    "order": "the batch in another order",
    "packing": "several texts in one row",
    "rollback": "wrong draft tokens dropped from the cache",
    "static": "through transformers' static cache",
}


class Failure(NumbersModel):
    """Why a check could not be run: a cache that raises is as wrong as one that gives other logits."""

    error: str


class ModelChecks(NumbersModel):
    """The checks of one model by name; `reach`: tokens that its longest window sees (0: it has none)."""

    role: Role
    reach: int
    dtype: str
    checks: dict[str, Deviation | Failure]

    def passed(self, name: str) -> bool:
        """Whether a check is within the rounding of the model's dtype."""
        result = self.checks[name]
        return isinstance(result, Deviation) and result.within(tolerance(self.dtype))

    @property
    def failed(self) -> list[str]:
        """The names of the checks that did not pass."""
        return [name for name in self.checks if not self.passed(name)]


class ConsistencyNumbers(NumbersModel):
    """`tokens`: of each text, the longest first; `prefill`: tokens of its prompt."""

    tokens: list[int]
    prefill: int
    models: dict[str, ModelChecks]


class Consistency(Section):
    """Logits of one full forward pass against those of every other way of feeding a text.

    `steps`: tokens decoded one by one, at least (a window is crossed in any case); `prefill`: tokens before them beyond
    the longest window.
    """

    NAME: ClassVar[str] = "consistency"
    TITLE: ClassVar[str] = "Is the cache right?"

    steps: int = Field(48, ge=8)
    prefill: int = Field(69, ge=3)

    def check(self, ctx: EvalContext) -> None:
        """Raises InputError for too little text."""
        if (tokens := sum(map(len, ctx.documents))) < LEAST_TOKENS:
            raise TooLittleTextError(f"the text has {tokens} tokens: checking the cache needs at least {LEAST_TOKENS}")

    def run(self, ctx: EvalContext) -> Numbers:
        """Every check that applies to a model, for every model, on the same tokens."""
        rows, prefill = self._rows(ctx)
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
            measure = partial(_measured, eval_model, rows, prefill, ctx)
            models[eval_model.name] = ctx.results.numbers(ModelChecks, key, measure)
        return ConsistencyNumbers(tokens=[len(row) for row in rows], prefill=prefill, models=models).to_json()

    def _rows(self, ctx: EvalContext) -> tuple[list[Tensor], int]:
        """Texts of unequal odd lengths from the held-out text, end to end, and where decoding begins in the first."""
        reach = max((longest_reach(m.plan) or 0 for m in ctx.models), default=0)
        stream = [token for document in ctx.documents for token in document.tokens]
        enough = reach + self.prefill + max(self.steps, reach + 5)
        longest = min([enough, ctx.length, len(stream), *filter(None, (m.context for m in ctx.models))])
        prefill = reach + self.prefill if longest == enough else longest // 2
        lengths = [longest - (longest % 2 == 0), int(longest * 0.61) | 1, max(longest // 4, PADDED_STEPS + 1) | 1]
        rows, at = [], 0
        for length in lengths:
            at = at if at + length <= len(stream) else max(len(stream) - length, 0)
            rows.append(torch.tensor(stream[at : at + length]))
            at += length
        return rows, prefill | 1

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """A finding per model and fault, and a row per model and check."""
        own = ConsistencyNumbers.model_validate(numbers)
        lengths = ", ".join(map(str, own.tokens))
        return SectionView(
            summary=(
                f"Texts of {lengths} tokens, each fed to each model at once and in every other way; the first "
                f"{own.prefill} tokens of the longest are its prompt. All must give the same logits up to rounding."
            ),
            findings=[
                finding for name, model in own.models.items() for finding in _findings(name, model, own.tokens[0])
            ],
            tables=[_table(own)],
        )

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        """Whether each student's cache is right."""
        stats = {}
        for name, model in ConsistencyNumbers.model_validate(numbers).models.items():
            if model.role == "student":
                failed = model.failed
                detail = f"fails: {', '.join(failed)}" if failed else f"{len(model.checks)} ways, the same logits"
                stats[name] = [Stat(label="cache", value="faulty" if failed else "right", detail=detail)]
        return stats


def _measured(eval_model: EvalModel, rows: Sequence[Tensor], prefill: int, ctx: EvalContext) -> ModelChecks:
    probe = CacheProbe(eval_model.model.eval(), rows, prefill, seed=ctx.seed)
    skipped = {"static"} if isinstance(eval_model.model, LinearizedForCausalLM) else set()
    skipped |= {"packing"} if ctx.one_per_row else set()  # the family does not keep documents apart
    return ModelChecks(
        role=eval_model.role,
        reach=longest_reach(eval_model.plan) or 0,
        dtype=eval_model.dtype,
        checks={name: _checked(name, probe) for name in CHECKS if name not in skipped},
    )


def _checked(name: str, probe: CacheProbe) -> Deviation | Failure:
    """The deviation, or why there is none."""
    try:
        return check(name, probe)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        return Failure(error=f"{type(error).__name__}: {one_line(error)}")


def _findings(name: str, model: ModelChecks, tokens: int) -> list[Finding]:
    """The findings on one model; `tokens`: of the longest text."""
    student = model.role == "student"
    faults = [(way, model.checks[way]) for way in model.failed]
    findings = [
        Finding.on(name, model.role, "bad" if student else "note", _fault(way, result)) for way, result in faults
    ]
    if student and not faults:
        text = f"{len(model.checks)} ways of feeding a text give the logits of one full pass"
        findings.append(Finding.on(name, model.role, "good", text))
    if student and tokens <= model.reach:
        text = (
            f"the longest text has {tokens} tokens, its window reaches {model.reach}: what leaves the window was not "
            "checked; give longer text or a larger length"
        )
        findings.append(Finding.on(name, model.role, "note", text))
    return findings


def _fault(way: str, result: Deviation | Failure) -> str:
    if isinstance(result, Failure):
        return f"{WORDS[way]} cannot be run: {result.error}"
    return (
        f"{WORDS[way]} gives other logits than one full pass: largest difference {result.largest:.2g} of their spread, "
        f"{result.flips} of {result.tokens} argmaxes differ, loss {result.loss:.4f}, not {result.expected_loss:.4f}"
    )


def _table(numbers: ConsistencyNumbers) -> Table:
    rows: list[dict[str, Cell]] = []
    for name, model in numbers.models.items():
        for way, result in model.checks.items():
            row: dict[str, Cell] = {"model": name, "way": WORDS[way], "same": "yes" if model.passed(way) else "NO"}
            columns = ("largest difference", "allowed", "argmax differs", "loss", "loss at once")
            cells: Sequence[str] = [""] * len(columns)
            if isinstance(result, Deviation):
                cells = (
                    f"{result.largest:.1e}", f"{tolerance(model.dtype)[0]:g}", f"{result.flips} of {result.tokens}",
                    f"{result.loss:.4f}", f"{result.expected_loss:.4f}",
                )  # fmt: skip
            rows.append(row | dict(zip(columns, cells, strict=True)))
    note = "Differences are those of logits, in standard deviations of a full pass's logits. Exact for these tokens."
    return Table(title="One text, many ways", rows=rows, note=note)
