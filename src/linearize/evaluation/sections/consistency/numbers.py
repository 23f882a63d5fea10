"""What the consistency section measures: by model and way of feeding a text, how far the logits are off."""

from __future__ import annotations

from linearize.evaluation.cache_checks import Deviation, tolerance
from linearize.evaluation.numbers import NumbersModel, Role


class Failure(NumbersModel):
    """Why a check could not be run: a cache that raises is as wrong as one that gives other logits."""

    error: str


class ModelChecks(NumbersModel):
    """The checks of one model by name; `reach`: tokens that its longest window sees (0: it has none)."""

    role: Role
    reach: int
    dtype: str
    checks: dict[str, Deviation | Failure]

    @property
    def tolerance(self) -> tuple[float, float, float]:
        """What is rounding in the model's dtype: see `cache_checks.tolerance`."""
        return tolerance(self.dtype)

    def passed(self, name: str) -> bool:
        """Whether a check is within the rounding of the model's dtype."""
        result = self.checks[name]
        return isinstance(result, Deviation) and result.within(self.tolerance)

    @property
    def failed(self) -> list[str]:
        """The names of the checks that did not pass."""
        return [name for name in self.checks if not self.passed(name)]


class ConsistencyNumbers(NumbersModel):
    """`tokens`: of each text, the longest first; `prefill`: tokens of its prompt."""

    tokens: list[int]
    prefill: int
    models: dict[str, ModelChecks]
