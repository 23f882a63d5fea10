"""Speed and memory over context and batch: student next to teacher, the teacher with its best cache and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from transformers import PreTrainedModel

from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, Stat
from linearize.evaluation.numbers import NumbersModel
from linearize.evaluation.sections.speed.largest_batch import largest_batch, peak_of_rows
from linearize.evaluation.sections.speed.numbers import (
    LargestBatch,
    ModelFacts,
    Point,
    SpeedNumbers,
    SpeedSettings,
    TimedPoint,
)
from linearize.evaluation.sections.speed.points import measure_point
from linearize.evaluation.sections.speed.present import headline, present
from linearize.evaluation.speed.equality import Check, check_model, length_needed
from linearize.evaluation.speed.memory import weight_bytes
from linearize.evaluation.speed.running import RunConfig, measuring, random_text, run_configs

SHARED_ROWS = 8  # where no memory budget is given: as much as this many rows of the first model take


class Checks(NumbersModel):
    """The checks of one model's configurations, as they are cached."""

    checks: list[Check]


class Points(NumbersModel):
    """All models at one context and batch, as they are cached."""

    points: list[TimedPoint | Point]


class Speed(SpeedSettings, Section):
    """Prefill, first token, decode, memory, and the largest batch in a memory budget; nothing where outputs differ."""

    NAME: ClassVar[str] = "speed"
    TITLE: ClassVar[str] = "Speed and memory"
    NEEDS_TEXT: ClassVar[bool] = False

    def run(self, ctx: EvalContext) -> Numbers:
        """Check the outputs of every configuration, then time every model at every context and batch."""
        contexts, batches = sorted(set(self.contexts)), sorted(set(self.batches))
        steps = len(contexts) * len(batches) + len(ctx.models)
        points: list[TimedPoint | Point] = []
        checks: list[Check] = []
        for batch in batches:
            own_checks = {eval_model.name: self._checks(ctx, eval_model, batch) for eval_model in ctx.models}
            checks += [check for model_checks in own_checks.values() for check in model_checks]
            for context in contexts:
                ctx.progress(f"speed at {context:,} tokens, batch {batch}", len(points) // len(ctx.models), steps)
                points += self._points(ctx, own_checks, context, batch)
        return SpeedNumbers(
            models={eval_model.name: _facts(eval_model) for eval_model in ctx.models},
            settings=SpeedSettings(**self.model_dump()),
            points=points,
            checks=checks,
            largest_batch=self._largest(ctx, points, steps),
        ).to_json()

    def _key(self, what: str, models: Sequence[EvalModel], seed: int, **sizes: Any) -> dict[str, Any]:
        """What a result depends on; the device too, since speeds do not travel."""
        settings = self.model_dump(mode="json", exclude={"contexts", "batches", "memory_budget_bytes", "most_rows"})
        return {
            "section": self.NAME, "what": what, **settings, "seed": seed, "device": str(models[0].model.device),
            "models": [[eval_model.name, eval_model.fingerprint] for eval_model in models], **sizes,
        }  # fmt: skip

    def _checks(self, ctx: EvalContext, eval_model: EvalModel, batch: int) -> list[Check]:
        """Compare each configuration with a plain forward, at a small length."""
        model = eval_model.model
        length = min(max(self.contexts), length_needed(model, self.check_tokens))

        def measure() -> Checks:
            configs = run_configs(model, self.caches, self.attentions)
            with measuring([model]):
                ids_BT = random_text([model], batch, length, ctx.seed)
                return Checks(checks=check_model(eval_model.name, model, configs, ids_BT))

        key = self._key("checks", [eval_model], ctx.seed, batch=batch, length=length)
        return ctx.results.numbers(Checks, key, measure).checks

    def _points(
        self, ctx: EvalContext, checks: Mapping[str, Sequence[Check]], context: int, batch: int
    ) -> list[TimedPoint | Point]:
        models = {eval_model.name: eval_model.model for eval_model in ctx.models}
        sizes = {"context": context, "batch": batch}
        key = self._key("point", ctx.models, ctx.seed, **sizes)
        measure = partial(measure_point, models, checks, self, **sizes, seed=ctx.seed)
        return ctx.results.numbers(Points, key, lambda: Points(points=measure())).points

    def _largest(self, ctx: EvalContext, points: Sequence[Point], steps: int) -> LargestBatch:
        """Find the largest batch of each model that has speeds, at the longest context."""
        context, few = max(self.contexts), min(self.batches)
        configs = {
            point.model: RunConfig(point.cache, point.attention)
            for point in points
            if isinstance(point, TimedPoint) and point.context == context and point.batch == few
        }
        able = [eval_model for eval_model in ctx.models if eval_model.name in configs and self.most_rows > 0]
        sizes: dict[str, int] = {"context": context, "chunk": self.chunk, "seed": ctx.seed}
        budget, source = self.memory_budget_bytes, "given"
        if budget is None and able:
            first = able[0]
            source, shared = f"{SHARED_ROWS} rows of {first.name}", {"rows": SHARED_ROWS, **sizes}
            measure_budget = partial(peak_of_rows, first.model, configs[first.name], **shared)
            key = self._key("budget", [first], config=str(configs[first.name]), **shared)
            budget = ctx.results.result(key, measure_budget)
        models: dict[str, Any] = {}
        for done, one in enumerate(able):
            ctx.progress("speed: the largest batch", steps - len(able) + done, steps)
            bounds: dict[str, Any] = {"budget": budget, "most": self.most_rows, **sizes}
            key = self._key("largest batch", [one], config=str(configs[one.name]), **bounds)
            measure = partial(_largest_batch, one.model, configs[one.name], bounds)
            models[one.name] = ctx.results.result(key, measure)
        return LargestBatch(context=context, budget_bytes=budget, budget_from=source, models=models)

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        return present(SpeedNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        return headline(SpeedNumbers.model_validate(numbers))


def _largest_batch(model: PreTrainedModel, config: RunConfig, bounds: Mapping[str, Any]) -> Numbers:
    return largest_batch(model, config, **bounds).to_json()


def _facts(eval_model: EvalModel) -> ModelFacts:
    return ModelFacts(
        role=eval_model.role,
        weight_bytes=weight_bytes(eval_model.model),
        trained_length=eval_model.context,
        dtype=eval_model.dtype,
        device=eval_model.model.device.type,
    )
