"""What the layers section measures: by model and converted layer, how its attention looks and how far its output is."""

from __future__ import annotations

from typing import Literal

from linearize.evaluation.numbers import MeanNumbers, NumbersModel, Role

Measure = Literal["entropy", "effective", "distance", "far", "error"]


class LayerNumbers(NumbersModel):
    """Means over texts: see `AttentionShape`. `error`: of the output, by the teacher's power (None: no teacher)."""

    layer: int
    mixer: str
    entropy: MeanNumbers
    effective: MeanNumbers
    distance: MeanNumbers
    far: MeanNumbers
    error: MeanNumbers | None

    def mean(self, measure: Measure) -> MeanNumbers | None:
        """Return one of the measures."""
        found: MeanNumbers | None = getattr(self, measure)
        return found


class ModelLayers(NumbersModel):
    """The layers of one model. `given`: whose hidden states they were given; `error`: why nothing was measured."""

    role: Role
    given: str | None
    layers: list[LayerNumbers]
    error: str | None = None


class LayersNumbers(NumbersModel):
    """`tokens`: of each text; `far`: tokens back where "far" begins."""

    tokens: list[int]
    far: int
    models: dict[str, ModelLayers]
