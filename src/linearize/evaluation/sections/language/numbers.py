"""What the language section measures: each model's loss and agreement on all tokens, and on parts of the text.

Losses, gaps (loss above the teacher's) and divergences are in nats per token.
"""

from __future__ import annotations

from pydantic import Field

from linearize.evaluation.numbers import MeanNumbers, NumbersModel, Role


class RatioNumbers(NumbersModel):
    """exp of a mean, with its 95% interval (None: unknown)."""

    value: float
    low: float | None
    high: float | None


class ModelLanguage(NumbersModel):
    """A model on all tokens; `bits_per_byte` is None for a text without bytes."""

    role: Role
    loss: MeanNumbers
    perplexity: RatioNumbers
    bits_per_byte: MeanNumbers | None


class ComparedLanguage(ModelLanguage):
    """A student against its teacher. `kept`: its probability of the true token by the teacher's, geometric mean;
    `top1`, `top5`: shares of the teacher's most likely tokens that are the student's too."""

    gap: MeanNumbers
    kept: RatioNumbers
    kl: MeanNumbers
    top1: MeanNumbers
    top5: MeanNumbers


class PartLosses(NumbersModel):
    """A model on a part; `window_gap`: the gap of its window alone."""

    loss: MeanNumbers
    gap: MeanNumbers | None = None
    window_gap: MeanNumbers | None = None


class PartNumbers(NumbersModel):
    """A part of the text: its tokens and documents, and what each model loses there."""

    tokens: int
    documents: int
    models: dict[str, PartLosses]


class BinNumbers(PartNumbers):
    """The tokens whose position, or whose document's length, is in [start, end)."""

    start: int
    end: int

    @property
    def span(self) -> str:
        """`8 to 15`."""
        return f"{self.start:,} to {self.end - 1:,}"


class GrowthMeans(NumbersModel):
    """A student's gap: `early`, `late`, late - early (`growth`) and late - 2 early (`doubling`)."""

    early: MeanNumbers
    late: MeanNumbers
    growth: MeanNumbers
    doubling: MeanNumbers


class GrowthNumbers(NumbersModel):
    """Gaps at positions from `early` to `middle`, and from there to `end`; without models where texts are too short."""

    early: int = 0
    middle: int = 0
    end: int = 0
    models: dict[str, GrowthMeans] = Field(default_factory=dict)


class FarEvidence(NumbersModel):
    """A student's gap where the evidence is beyond its window, less that of all tokens, or of those with it inside.

    `share`: how much of what its window alone loses there, against the teacher, the linear branch wins back; None where
    the window cannot run alone or loses nothing.
    """

    over_all: MeanNumbers
    over_inside: MeanNumbers
    share: MeanNumbers | None


class EvidenceNumbers(NumbersModel):
    """Losses by where a token's evidence is, for the `students` whose window reaches `reach` tokens back.

    `classes`: beyond, inside, none; `compared` is None for a student without tokens of both kinds.
    """

    reach: int
    students: list[str]
    classes: dict[str, PartNumbers]
    compared: dict[str, FarEvidence | None]


class LanguageNumbers(NumbersModel):
    """The whole section; `length`: tokens a row."""

    tokens: int
    documents: int
    bytes: int
    length: int
    models: dict[str, ComparedLanguage | ModelLanguage]
    positions: list[BinNumbers]
    lengths: list[BinNumbers]
    growth: GrowthNumbers
    evidence: list[EvidenceNumbers]

    @property
    def compared(self) -> dict[str, ComparedLanguage]:
        """The students that have a teacher."""
        return {name: model for name, model in self.models.items() if isinstance(model, ComparedLanguage)}

    def evidence_of(self, student: str) -> EvidenceNumbers:
        """The losses by evidence at a student's own reach."""
        return next(entry for entry in self.evidence if student in entry.students)
