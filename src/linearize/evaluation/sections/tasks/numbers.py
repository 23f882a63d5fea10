"""What the tasks section measures: by model and task the scores, by student what it keeps of the teacher's."""

from __future__ import annotations

from typing import Literal

from linearize.evaluation.harness.contrast import CLEAR, Average, AverageShare, Contrast
from linearize.evaluation.harness.outcome import Scored
from linearize.evaluation.numbers import NumbersModel


class TaskScore(Scored):
    """A task on a model: `score`, the mean of the first metric, its standard error, and what guessing scores."""

    score: float
    stderr: float | None
    chance: float

    @property
    def above_chance(self) -> bool:
        """Whether the model is clearly above chance."""
        above = self.score - self.chance
        return self.stderr is not None and above > 0 and above > CLEAR * self.stderr and not self.lower_is_better


class TasksNumbers(NumbersModel):
    """`source`: where the items come from; `batch` rows of at most `max_length` tokens; `limit`: items of each task.

    `notes`, `commands`: by task. `models`, `averages`: by model. `against_teacher`, `kept`: by student.
    """

    lm_eval: str
    source: str
    batch: int
    max_length: int
    limit: int | None
    notes: dict[str, str]
    commands: dict[str, str]
    models: dict[str, dict[str, TaskScore]]
    averages: dict[str, dict[Literal["all", "without_mmlu"], Average]]
    against_teacher: dict[str, dict[str, Contrast]]
    kept: dict[str, AverageShare | None]
