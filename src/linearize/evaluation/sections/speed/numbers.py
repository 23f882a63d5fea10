"""What the speed section measures: time and memory by model, context and batch; output checks; the largest batch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from linearize.evaluation.numbers import NumbersModel, Role
from linearize.evaluation.speed.equality import Check
from linearize.evaluation.speed.running import CacheKind, Timing
from linearize.numbers import size_text

AtLeastOne = Annotated[int, Field(ge=1)]


class SpeedSettings(NumbersModel):
    """How and where speed is measured.

    `contexts`, `batches`: all pairs are measured; contexts beyond what a model was trained on are allowed. `chunk`:
    tokens of one forward in a prefill. `new_tokens`: tokens of one repeat of decode, `repeats` repeats after `warmup`
    untimed ones; `prefill_repeats` of the prefill. `memory_budget_bytes`: for the largest batch, caches and activations
    without the weights; None: what eight rows of the first model take at the longest context. `most_rows`: the
    largest batch that is tried (0: none is looked for). `check_tokens`: length of the check that comes before the
    speeds. `caches`, `attentions`: what a teacher is tried with, the usual one first.
    """

    contexts: tuple[AtLeastOne, ...] = Field((1024, 4096, 16384), min_length=1)
    batches: tuple[AtLeastOne, ...] = Field((1,), min_length=1)
    new_tokens: AtLeastOne = 64
    repeats: AtLeastOne = 5
    prefill_repeats: AtLeastOne = 3
    warmup: int = Field(1, ge=0)
    chunk: AtLeastOne = 2048
    check_tokens: int = Field(96, ge=2)
    memory_budget_bytes: AtLeastOne | None = None
    most_rows: int = Field(1024, ge=0)
    caches: tuple[CacheKind, ...] = Field(("static", "dynamic"), min_length=1)
    attentions: tuple[str, ...] = Field(("sdpa", "eager"), min_length=1)


class ModelFacts(NumbersModel):
    """What a reader must know of a model to judge its speeds; `trained_length` in tokens, None: not known."""

    role: Role
    weight_bytes: int
    trained_length: int | None
    dtype: str
    device: str


class DecodeSpeed(NumbersModel):
    """Decode of all rows together; milliseconds are those of one step: the median, the lowest and highest repeat."""

    decode_tokens_per_second: float
    ms_per_token: float
    ms_spread: tuple[float, float]

    @property
    def rate(self) -> str:
        """Tokens per second, whole."""
        return f"{self.decode_tokens_per_second:,.0f}"

    @property
    def step(self) -> str:
        """Milliseconds of one step, with the spread."""
        low, high = self.ms_spread
        return f"{self.ms_per_token:.3g} ms ({low:.3g} to {high:.3g})"


def decode_speed(timing: Timing, batch: int, tokens: int) -> DecodeSpeed:
    """Return the speed of `batch` rows that read `tokens` tokens each in the time of one repeat."""
    ms, spread = timing.ms_per_token(tokens)
    return DecodeSpeed(decode_tokens_per_second=batch * tokens / timing.seconds, ms_per_token=ms, ms_spread=spread)


class Trials(NumbersModel):
    """Milliseconds by configuration, one trial each: of the whole prefill, and of the fastest token."""

    prefill: dict[str, float]
    token: dict[str, float]


class Point(NumbersModel):
    """One model at one context and batch without a speed, for this `reason`."""

    model: str
    context: int
    batch: int
    reason: str


class TimedPoint(Point, DecodeSpeed):
    """One model at one context and batch, each part in its fastest configuration; `reason` is empty.

    `cache_bytes`: after the prefill; `peak_bytes`: the most of cache and activations, without the weights.
    """

    prefill_tokens_per_second: float
    ms_first_token: float
    ms_first_token_spread: tuple[float, float]
    peak_bytes: int
    cache_bytes: int
    cache: CacheKind
    attention: str
    prefill_cache: CacheKind
    prefill_attention: str
    ms_trials: Trials


class Rows(NumbersModel):
    """The most rows that fit, without a speed for this `reason`; all but `batch` only where the model ran."""

    batch: int
    reason: str
    capped: bool = False
    cache: CacheKind | None = None
    attention: str | None = None
    peak_bytes: int | None = None


class TimedRows(Rows, DecodeSpeed):
    """The most rows that fit, and their speed; `capped`: more were not tried. `reason` is empty."""


class LargestBatch(NumbersModel):
    """How many rows of `context` tokens decode at once; the models without a speed there are left out.

    `budget_from`: `given`, or what the budget is the memory of.
    """

    context: int
    budget_bytes: int | None
    budget_from: str
    models: dict[str, TimedRows | Rows]

    @property
    def place(self) -> str:
        """Context and budget in words."""
        return f"{self.context:,} tokens of context in {size_text(self.budget_bytes or 0, binary=True)}"


class SpeedNumbers(NumbersModel):
    """The whole section."""

    models: dict[str, ModelFacts]
    settings: SpeedSettings
    points: list[TimedPoint | Point]
    checks: list[Check]
    largest_batch: LargestBatch

    @property
    def teacher(self) -> str | None:
        """The teacher's name; None where there is none."""
        return next((name for name, model in self.models.items() if model.role == "teacher"), None)

    @property
    def timed(self) -> list[TimedPoint]:
        """The points that have a speed."""
        return [point for point in self.points if isinstance(point, TimedPoint)]

    def pairs(self, student: str) -> list[tuple[TimedPoint, TimedPoint]]:
        """Student and teacher at the smallest batch, by context, where both have speeds."""
        batch = min(self.settings.batches)
        timed = {(point.model, point.context): point for point in self.timed if point.batch == batch}
        contexts = sorted({context for _, context in timed})
        both = [(timed.get((student, c)), timed.get((str(self.teacher), c))) for c in contexts]
        return [(own, other) for own, other in both if own is not None and other is not None]
