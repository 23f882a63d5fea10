"""Speed and memory over context and batch: student beside teacher, the teacher with its best cache and attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, Stat
from linearize.evaluation.speed.largest_batch import largest_batch, peak_of_rows
from linearize.evaluation.speed.memory import weight_bytes
from linearize.evaluation.speed.points import Checked, Protocol, measure_point, pruned_configs
from linearize.evaluation.speed.run_config import CacheKind, RunConfig

SHARED_ROWS = 8  # where no memory budget is given: as much as this many rows of the first model take


class Speed(Section):
    """Prefill, first token, decode, memory, and the largest batch in a memory budget.

    `contexts`, `batches`: all pairs are measured; contexts beyond what a model was trained on are allowed. `chunk`:
    tokens of one forward in a prefill. `new_tokens`: tokens of one repeat of decode, `repeats` repeats after `warmup`
    untimed ones; `prefill_repeats` of the prefill. `memory_budget_bytes`: for the largest batch, caches and activations
    without the weights; None: what eight rows of the first model take at the longest context. `most_rows`: the
    largest batch that is tried (0: none is looked for). `check_tokens`: length of the check that comes before the
    speeds. `caches`, `attentions`: what a teacher is tried with, the usual one first.
    """

    NAME: ClassVar[str] = "speed"
    TITLE: ClassVar[str] = "Speed and memory"

    contexts: tuple[int, ...] = (1024, 4096, 16384)
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 64
    repeats: int = 5
    prefill_repeats: int = 3
    warmup: int = 1
    chunk: int = 2048
    check_tokens: int = 96
    memory_budget_bytes: int | None = None
    most_rows: int = 1024
    caches: tuple[CacheKind, ...] = ("static", "dynamic")
    attentions: tuple[str, ...] = ("sdpa", "eager")

    @property
    def needs_text(self) -> bool:
        """No: it brings its own items."""
        return False

    def check(self, ctx: EvalContext) -> None:
        """Raises InputError for sizes below what can be measured."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None:
                continue
            for size in value if isinstance(value, tuple) else (value,):
                if size < least:
                    raise InputError(f"speed: {name.replace('_', ' ')} is {size}: it must be at least {least}")
        for name in ("contexts", "batches", "caches", "attentions"):
            if not getattr(self, name):
                raise InputError(f"speed: {name} is empty: give at least one")

    def run(self, ctx: EvalContext) -> Numbers:
        """`models`, `points`, `checks`, `largest_batch`."""
        self.check(ctx)
        contexts, batches = sorted(set(self.contexts)), sorted(set(self.batches))
        steps = len(contexts) * len(batches) + len(ctx.models)
        points: list[dict[str, Any]] = []
        checks: list[dict[str, Any]] = []
        checked: Checked = {}
        for batch in batches:
            pruned: dict[str, set[str]] = {}
            for context in contexts:
                done = len(points) // len(ctx.models)
                ctx.progress(f"speed at {context:,} tokens, batch {batch}", done, steps)
                found = self._point(ctx, context, batch, pruned, checked)
                points += found["points"]
                checks += [check for check in found["checks"] if check not in checks]
                pruned = {
                    row["model"]: pruned.get(row["model"], set()) | pruned_configs(row) for row in found["points"]
                }
        return {
            "models": {c.name: _model(c.model, c.role) for c in ctx.models},
            "settings": self.model_dump(mode="json"),
            "points": points,
            "checks": checks,
            "largest_batch": self._largest(ctx, points, steps),
        }

    def _point(
        self, ctx: EvalContext, context: int, batch: int, pruned: Mapping[str, set[str]], checked: Checked
    ) -> dict[str, Any]:
        protocol = Protocol(
            **{name: getattr(self, name) for name in Protocol.__dataclass_fields__ if name != "seed"}, seed=ctx.seed
        )
        models = {c.name: c.model for c in ctx.models}
        key = self._key(ctx, "point") | {"context": context, "batch": batch}
        key["models"] = [[c.name, c.fingerprint] for c in ctx.models]
        found: dict[str, Any] = ctx.results.result(
            key,
            lambda: measure_point(models, protocol, context=context, batch=batch, pruned=pruned, checked=checked),
        )
        return found

    def _key(self, ctx: EvalContext, what: str) -> dict[str, Any]:
        """All settings but which contexts and batches; where it ran, since speeds do not travel."""
        device = str(ctx.models[0].model.device)
        sizes = self.model_dump(mode="json", exclude={"contexts", "batches", "memory_budget_bytes", "most_rows"})
        return {"section": self.NAME, "what": what, **sizes, "seed": ctx.seed, "device": device}

    def _largest(self, ctx: EvalContext, points: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
        """The largest batch of each model that has speeds, at the longest context."""
        context, few = max(self.contexts), min(self.batches)
        at_longest = [row for row in points if row["context"] == context and row["batch"] == few and not row["reason"]]
        configs = {row["model"]: RunConfig(row["cache"], row["attention"]) for row in at_longest}
        able = [c for c in ctx.models if c.name in configs and self.most_rows > 0]
        sizes = {"context": context, "chunk": self.chunk, "seed": ctx.seed}

        def kept(eval_model: EvalModel, measure: Callable[..., Any], **more: Any) -> Any:
            config = configs[eval_model.name]
            key = self._key(ctx, measure.__name__) | sizes | more | {"way": str(config), "name": eval_model.name}
            key["model"] = eval_model.fingerprint
            return ctx.results.result(key, lambda: measure(eval_model.model, config, **sizes, **more))

        budget = self.memory_budget_bytes
        if budget is None and able:
            budget = kept(able[0], peak_of_rows, rows=SHARED_ROWS)
        models: dict[str, Any] = {}
        for done, eval_model in enumerate(able):
            ctx.progress("speed: the largest batch", steps - len(able) + done, steps)
            models[eval_model.name] = kept(eval_model, largest_batch, budget=budget, most=self.most_rows)
        given = self.memory_budget_bytes is not None
        return {
            "context": context,
            "budget_bytes": budget,
            "budget_from": "given" if given or not able else f"{SHARED_ROWS} rows of {able[0].name}",
            "models": models,
        }

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """Tables, plots of time and memory against context, crossovers."""
        from linearize.evaluation.sections.speed.present import present

        return present(numbers)

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        """Decode, prefill and cache at the longest context."""
        from linearize.evaluation.sections.speed.present import headline

        return headline(numbers)


LEAST = {
    "contexts": 1,
    "batches": 1,
    "new_tokens": 1,
    "repeats": 1,
    "prefill_repeats": 1,
    "warmup": 0,
    "chunk": 1,
    "check_tokens": 2,
    "memory_budget_bytes": 1,
    "most_rows": 0,
}


def _model(model: Any, role: str) -> dict[str, Any]:
    """What a reader must know of a model to judge its speeds."""
    text = getattr(model, "lm", model).config.get_text_config()
    return {
        "role": role,
        "weight_bytes": weight_bytes(model),
        "trained_length": getattr(text, "max_position_embeddings", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
