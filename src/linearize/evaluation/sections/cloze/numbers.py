"""What the cloze section measures: by model, shares of right last words, and what a student lost of its teacher's."""

from __future__ import annotations

from linearize.evaluation.numbers import DifferenceNumbers, NumbersModel, Role, ShareNumbers


class LostShares(NumbersModel):
    """Teacher less student on the same items, by way of asking; `gap`: generated less scored."""

    scored_drop: DifferenceNumbers
    generated_drop: DifferenceNumbers
    gap: DifferenceNumbers


class ModelCloze(NumbersModel):
    """Shares of right words: chosen among others (`scored`), argmax of a full forward (`greedy`), and `generated`.

    `cache_differs`: items where greedy generation and the full forward disagree beyond `ties`. The drops and their gap
    are set for a student with a teacher.
    """

    role: Role
    scored: ShareNumbers
    greedy: ShareNumbers
    generated: ShareNumbers
    cache_differs: int
    ties: int
    scored_drop: DifferenceNumbers | None = None
    generated_drop: DifferenceNumbers | None = None
    gap: DifferenceNumbers | None = None

    @property
    def lost(self) -> LostShares | None:
        """What the student lost; None without a teacher."""
        if self.scored_drop is None or self.generated_drop is None or self.gap is None:
            return None
        return LostShares(scored_drop=self.scored_drop, generated_drop=self.generated_drop, gap=self.gap)


class ExampleAnswer(NumbersModel):
    """What one model chose and wrote for an item."""

    chose: str
    wrote: str


class ClozeExample(NumbersModel):
    """An item with the answers to it, by model; `context`: the last words before the one asked for."""

    context: str
    word: str
    models: dict[str, ExampleAnswer]


class ClozeNumbers(NumbersModel):
    """`items`: how many; `choices`: of each; `tokens`: of a right word, on average."""

    items: int
    choices: int
    tokens: float
    models: dict[str, ModelCloze]
    examples: list[ClozeExample]
