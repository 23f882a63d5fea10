"""The plan: which layers there are, and which mixer sits in which. A layer without one keeps its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.mixers.layer_mixer import LayerMixerConfig
from linearize.mixers.retrieval_heads import RetrievalHeadsConfig
from linearize.recipes.heads import KeepHeads
from linearize.recipes.schedule import ScheduleChoice, rounded
from linearize.registry import choice

if TYPE_CHECKING:
    from linearize.mixers import MixerConfig

    MixerChoice: TypeAlias = MixerConfig
else:
    MixerChoice = choice(MIXERS.own.values(), lambda: MIXERS)

_LAYERS_HELP = (
    "allowed: all, a list of layer indices like [0, 2, -1], {keep: RATIO}, {keep: RATIO, select: sensitivity}, "
    "{keep: [0, -1]} or {every: N}"
)


class KeepLayers(BaseModel):
    """`{keep: RATIO}` or `{keep: [indices]}`: these layers keep softmax attention, all others are converted.

    `select`: which layers a ratio keeps: `uniform` spreads them evenly; `sensitivity` keeps those whose replacement
    alone moves the model furthest from the teacher (KL-guided, 2512.20569).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: float | tuple[int, ...]
    select: Literal["uniform", "sensitivity"] = "uniform"

    @property
    def needs_scores(self) -> bool:
        """Whether the choice depends on how sensitive the layers are."""
        return self.select == "sensitivity" and self.keep != 0

    def converted(self, num_layers: int, scores: Sequence[float] | None = None) -> list[int]:
        """The layers that are converted, in order.

        A ratio r in [0, 1) keeps n = r * num_layers layers, rounded with halves down. Spread evenly, kept layer i of n
        is floor((i + 1/2) * num_layers / n), so a ratio of 0.5 converts layers 0, 2, 4, ... as in 2408.15237.

        Args:
            scores: what replacing each layer alone costs; needed where `needs_scores`. Of equal ones the first is kept.

        Raises:
            InputError: a ratio that keeps no layer or every layer of this model, or an index it does not have.
        """
        if isinstance(self.keep, tuple):
            kept = layer_indices(self.keep, num_layers, "plan.layers.keep")
        elif self.needs_scores:
            assert scores is not None and len(scores) == num_layers
            by_cost = sorted(range(num_layers), key=lambda layer: -scores[layer])
            kept = by_cost[: self._count(self.keep, num_layers)]
        else:
            count = self._count(self.keep, num_layers)
            kept = [(2 * i + 1) * num_layers // (2 * count) for i in range(count)]
        return [i for i in range(num_layers) if i not in kept]

    @staticmethod
    def _count(ratio: float, num_layers: int) -> int:
        count = rounded(ratio * num_layers)
        if count == 0 and ratio > 0:
            raise InputError(
                f"plan.layers.keep: a ratio of {ratio} keeps none of {num_layers} layers; "
                f"give 0, or more than {0.5 / num_layers:.3g}"
            )
        return count


class EveryLayer(BaseModel):
    """`{every: N}`: layers 0, N, 2N, ... are converted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int

    def converted(self, num_layers: int) -> list[int]:
        """The layers that are converted, in order."""
        return list(range(0, num_layers, self.every))


class PlanConfig(BaseModel):
    """The mixer, the layers it goes to, other mixers for single layers, heads that keep their attention in converted
    layers, and whether the layers are converted all at once or step by step (`schedule`). Negative indices count from
    the end.

    `depth` makes a draft, the target with some of its layers alone: their number, or a list of them. All other layer
    indices are those of the draft then, and `mixer` may be left out: the layers stay as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: int | tuple[int, ...] | None = Field(None, validate_default=True, description="null: all layers, no draft")
    mixer: MixerChoice | None = Field(None, validate_default=True, description="null: none, of a draft alone")
    layers: Literal["all"] | tuple[int, ...] | KeepLayers | EveryLayer = "all"
    overrides: dict[int, MixerChoice] = Field(default_factory=dict, description="another mixer for single layers")
    heads: KeepHeads | None = Field(None, description="null: no head keeps softmax in a converted layer")
    schedule: ScheduleChoice | None = Field(None, description="null: all layers at once")

    @field_validator("depth", mode="before")
    @classmethod
    def _check_depth(cls, value: object) -> object:
        if value is None or (_is_int(value) and value >= 1) or (_is_index_list(value) and value):  # type: ignore[operator]
            return value
        raise InputError(f"{value!r} given; allowed: a number of layers from 1, or a list of layers like [0, 2, -1]")

    @field_validator("mixer")
    @classmethod
    def _mixer_or_draft(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.data.get("depth", 1) is None:
            raise PydanticCustomError("missing", "Field required")
        return value

    @model_validator(mode="after")
    def _something_to_place(self) -> PlanConfig:
        rest = (self.overrides, self.heads, self.schedule)
        if self.mixer is None and (self.layers != "all" or any(rest)):
            raise ValueError("layers, overrides, heads and schedule need plan.mixer: set it, or leave them out")
        return self

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: object) -> object:
        if value == "all" or isinstance(value, (KeepLayers, EveryLayer)) or _is_index_list(value):
            return value
        if isinstance(value, Mapping) and set(value) <= {"keep", "select"} and "keep" in value:
            _check_keep(value["keep"], value.get("select", "uniform"))
            return value
        if isinstance(value, Mapping) and set(value) == {"every"} and _is_int(value["every"]) and value["every"] >= 1:
            return value
        raise InputError(f"{value!r} given; {_LAYERS_HELP}")

    @property
    def needs_scores(self) -> bool:
        """Whether `resolve` needs to know how sensitive the layers are."""
        return isinstance(self.layers, KeepLayers) and self.layers.needs_scores

    def draft_layers(self, num_layers: int) -> list[int] | None:
        """The target's layers that a draft has, in order; None where the plan makes no draft.

        Of a number n: the first, the last and evenly between; of 1, the first.

        Raises:
            InputError: more layers than the target has, one that it does not have, or one named twice.
        """
        if self.depth is None:
            return None
        if not isinstance(self.depth, int):
            return sorted(layer_indices(self.depth, num_layers, "plan.depth"))
        if self.depth > num_layers:
            raise InputError(
                f"plan.depth: {self.depth} layers given, the target has {num_layers}: give at most {num_layers}"
            )
        return [i * (num_layers - 1) // max(self.depth - 1, 1) for i in range(self.depth)]

    def resolve(self, num_layers: int, scores: Sequence[float] | None = None) -> list[MixerChoice | None]:
        """One entry per layer: its mixer's config, or None where the layer keeps its attention.

        Args:
            scores: what replacing each layer alone costs; needed where `needs_scores`.

        Raises:
            InputError: an index the model does not have or named twice, an override of a layer that is not converted
                (or not yet known to be), or nothing to convert.
        """
        if self.mixer is None:
            return [None] * num_layers
        if self.needs_scores and self.overrides:
            raise InputError(
                "plan.overrides: single layers given, but plan.layers.select: sensitivity chooses the layers; "
                "name them in plan.layers instead"
            )
        if isinstance(self.layers, KeepLayers):
            converted = self.layers.converted(num_layers, scores)
        elif isinstance(self.layers, EveryLayer):
            converted = self.layers.converted(num_layers)
        elif self.layers == "all":
            converted = list(range(num_layers))
        else:
            converted = layer_indices(self.layers, num_layers, "plan.layers")
        if not converted:
            raise InputError(f"plan.layers: nothing to convert, all {num_layers} layers keep softmax: keep fewer")
        indices = layer_indices(tuple(self.overrides), num_layers, "plan.overrides")
        for index in indices:
            if index not in converted:
                raise InputError(f"plan.overrides: layer {index} is not converted; add it to plan.layers or drop it")
        mixers = dict.fromkeys(converted, self.mixer) | dict(zip(indices, self.overrides.values(), strict=True))
        return [mixers.get(i) for i in range(num_layers)]

    def with_heads(
        self,
        mixers: Sequence[MixerChoice | None],
        counts: Sequence[int],
        scores: Mapping[tuple[int, int], float] | None = None,
    ) -> list[MixerChoice | None]:
        """The mixers of the layers with the heads that `heads` keeps beside them.

        Args:
            mixers: as `resolve` gives them.
            counts: key/value groups of each layer's attention; 0 where the teacher limits it to a window.
            scores: of each group; needed for the right choice where `heads.needs_scores`.

        Raises:
            InputError: groups that do not exist, or that cannot be kept.
        """
        if self.heads is None:
            return list(mixers)
        between = {
            i: counts[i]
            for i, mixer in enumerate(mixers)
            if mixer is not None and not isinstance(mixer, LayerMixerConfig) and counts[i]
        }
        kept = self.heads.chosen(between, len(mixers), scores)
        return [
            RetrievalHeadsConfig(groups=tuple(kept[i]), mixer=mixer) if i in kept else mixer
            for i, mixer in enumerate(mixers)
        ]

    def steps(self, converted: Sequence[int], num_layers: int) -> list[list[int]]:
        """The layers converted after each step of the schedule; one step of all of them without one.

        Raises:
            InputError: a schedule that does not end with these layers.
        """
        return [list(converted)] if self.schedule is None else self.schedule.steps(converted, num_layers)


def layer_indices(indices: tuple[int, ...], num_layers: int, key: str) -> list[int]:
    """Layer indices in their order, negative ones counted from the end.

    Raises:
        InputError: an index outside the model, or two that name the same layer.
    """
    result: list[int] = []
    for index in indices:
        if not -num_layers <= index < num_layers:
            raise InputError(
                f"{key}: layer {index} given, the model has {num_layers} layers: "
                f"allowed are 0 to {num_layers - 1}, or -{num_layers} to -1 from the end"
            )
        if index % num_layers in result:
            raise InputError(f"{key}: {list(indices)} names layer {index % num_layers} twice; name it once")
        result.append(index % num_layers)
    return result


def _check_keep(keep: object, select: object) -> None:
    if select not in ("uniform", "sensitivity"):
        raise InputError(f"select: {select!r} given; allowed: uniform or sensitivity")
    if isinstance(keep, (list, tuple)):
        if not _is_index_list(keep):
            raise InputError(f"{{'keep': {keep!r}}} given; {_LAYERS_HELP}")
        if select != "uniform":
            raise InputError(f"select: {select!r} given for a list of layers; it chooses the layers of a ratio")
    elif not _is_ratio(keep):
        raise InputError(f"keep: {keep!r} given; allowed: a ratio from 0 and below 1, or a list of indices")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ratio(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _is_index_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_int, value))
