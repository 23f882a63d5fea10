"""The gate of every report: a model must give the same logits however a text comes to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linearize.errors import InputError, one_line
from linearize.evaluation.cache_checks import CHECKS, PADDED_STEPS, CacheProbe, Deviation, check, tolerance
from linearize.evaluation.context import EvalContext, EvalModel, Finding, Numbers, Section, SectionView, Stat, Table
from linearize.metrics.branches import longest_reach
from linearize.modeling import LinearizedForCausalLM

LEAST_TOKENS = 24  # of the longest text that is fed in several ways
WORDS = {
    "decode": "token by token through the cache",
    "chunks": "prefill in uneven pieces",
    "padding": "a left-padded batch of unequal texts",
    "order": "the batch in another order",
    "packing": "several texts in one row",
    "rollback": "wrong draft tokens dropped from the cache",
    "static": "through transformers' static cache",
}


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
        models: Numbers = {}
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
            models[eval_model.name] = ctx.results.result(
                key,
                lambda c=eval_model: _measured(c, rows, prefill, ctx.seed, ctx.one_per_row),  # type: ignore[misc]
            )
        return {"tokens": [len(row) for row in rows], "prefill": prefill, "models": models}

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
        """A finding per model that fails, a row per model and check."""
        return SectionView(
            summary=_summary(numbers),
            findings=[finding for name in numbers["models"] for finding in _findings(numbers, name)],
            tables=[_table(numbers)],
        )

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        """Whether the student's cache is right."""
        stats = {}
        for name, model in numbers["models"].items():
            if model["role"] == "student":
                failed = [way for way in model["checks"] if not passed(model, way)]
                told = f"fails: {', '.join(failed)}" if failed else f"{len(model['checks'])} ways, the same logits"
                stats[name] = [Stat(label="cache", value="faulty" if failed else "right", detail=told)]
        return stats


def passed(model: Numbers, name: str) -> bool:
    """Whether a model's check is within rounding of its dtype."""
    found = model["checks"][name]
    if "error" in found:
        return False
    return Deviation(**found).within(tolerance(model["dtype"]))


def _positions(eval_model: EvalModel) -> int:
    """Tokens that a model has positions for."""
    most = getattr(eval_model.model.config.get_text_config(), "max_position_embeddings", None)
    return int(most) if most else 2**31


def _measured(eval_model: EvalModel, rows: Sequence[Tensor], prefill: int, seed: int, one_per_row: bool) -> Numbers:
    probe = CacheProbe(eval_model.model.eval(), rows, prefill, seed=seed)
    left = {"static"} if isinstance(eval_model.model, LinearizedForCausalLM) else set()
    left |= {"packing"} if one_per_row else set()  # the family cannot, and is never asked to
    names = [name for name in CHECKS if name not in left]
    return {
        "role": eval_model.role,
        "reach": longest_reach(eval_model.plan) or 0,
        "dtype": str(eval_model.model.dtype).removeprefix("torch."),
        "checks": {name: _checked(name, probe) for name in names},
    }


def _checked(name: str, probe: CacheProbe) -> Numbers:
    """A deviation, or why there is none: a cache that raises is as wrong as one that gives other logits."""
    try:
        return asdict(check(name, probe))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        return {"error": f"{type(error).__name__}: {one_line(error)}"}


def _summary(numbers: Numbers) -> str:
    lengths = ", ".join(map(str, numbers["tokens"]))
    return (
        f"Texts of {lengths} tokens, each given to each model at once and in every other way; the first "
        f"{numbers['prefill']} tokens of the longest are its prompt. All ways must give the same logits up to rounding."
    )


def _findings(numbers: Numbers, name: str) -> list[Finding]:
    model = numbers["models"][name]
    student = model["role"] == "student"
    failed = [way for way in model["checks"] if not passed(model, way)]
    findings = [
        Finding(level="bad" if student else "note", text=_fault(name, model, way), student=name if student else None)
        for way in failed
    ]
    if not failed and student:
        largest = max(found["largest"] for found in model["checks"].values())
        text = (
            f"{name}: {len(model['checks'])} ways of feeding a text give the logits of one full pass "
            f"(largest difference {largest:.1g} of their spread, allowed {tolerance(model['dtype'])[0]:g} in "
            f"{model['dtype']})"
        )
        findings.append(Finding(level="good", text=text, student=name))
    if student and (tokens := numbers["tokens"][0]) <= model["reach"]:
        text = (
            f"{name}: the longest text has {tokens} tokens, its window reaches {model['reach']}: what leaves the "
            "window was not checked; give longer text or a larger length"
        )
        findings.append(Finding(level="note", text=text, student=name))
    return findings


def _fault(name: str, model: Numbers, way: str) -> str:
    found = model["checks"][way]
    if "error" in found:
        return f"{name}: {WORDS[way]} cannot be run: {found['error']}"
    largest, rms, loss = tolerance(model["dtype"])
    return (
        f"{name}: {WORDS[way]} gives other logits than one full pass: largest difference {found['largest']:.2g} of "
        f"their spread (allowed {largest:g}), rms {found['rms']:.2g} (allowed {rms:g}), {found['flips']} of "
        f"{found['tokens']} argmaxes differ, loss {found['loss']:.4f} instead of {found['expected_loss']:.4f} "
        f"(allowed {loss:g} apart)"
    )


def _table(numbers: Numbers) -> Table:
    rows: list[dict[str, Any]] = []
    for name, model in numbers["models"].items():
        for way, found in model["checks"].items():
            row: dict[str, Any] = {"model": name, "way": WORDS[way], "same": "yes" if passed(model, way) else "NO"}
            if "error" not in found:
                row |= {
                    "largest difference": f"{found['largest']:.1e}",
                    "argmax differs": f"{found['flips']} of {found['tokens']}",
                    "loss": f"{found['loss']:.4f}",
                    "loss at once": f"{found['expected_loss']:.4f}",
                }
            rows.append({key: row.get(key, "") for key in COLUMNS})
    note = "Differences are those of logits, in standard deviations of a full pass's logits. Exact for these tokens."
    return Table(title="One text, many ways", rows=rows, note=note)


COLUMNS = ("model", "way", "same", "largest difference", "argmax differs", "loss", "loss at once")
