"""Which heads of converted layers keep softmax attention: the key `plan.heads`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, field_validator

from linearize.errors import InputError
from linearize.recipes.schedule import rounded


class KeepHeads(BaseModel):
    """`{keep: N}`, `{keep: RATIO}` or `{keep: [[layer, group], ...]}`: these key/value groups of converted layers keep
    full softmax attention, with all their query heads; the others become the mixer (2602.11374).

    A number, or a ratio of the groups of all converted layers, keeps those that the teacher looks up answers with
    (`linearize inspect --heads`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: int | float | tuple[tuple[int, int], ...]

    @field_validator("keep", mode="before")
    @classmethod
    def _check(cls, value: object) -> object:
        named = isinstance(value, (list, tuple)) and value and all(map(_is_place, value))
        if named or (_is_int(value) and value >= 1) or (isinstance(value, float) and 0 < value <= 1):  # type: ignore[operator]
            return value
        raise InputError(
            f"keep: {value!r} given; allowed: a number of key/value groups from 1, a ratio above 0 and up to 1 (with a "
            "point, like 0.05), or a list like [[layer, group], ...]"
        )

    @property
    def needs_scores(self) -> bool:
        """Whether the choice depends on what the teacher's heads do."""
        return not isinstance(self.keep, tuple)

    def chosen(
        self, counts: Mapping[int, int], num_layers: int, scores: Mapping[tuple[int, int], float] | None = None
    ) -> dict[int, list[int]]:
        """The groups that are kept, by layer.

        Args:
            counts: key/value groups of each layer whose heads can be kept.
            scores: of (layer, group), the largest are kept; None: any, spread evenly.

        Raises:
            InputError: more groups than there are, or one that does not exist or cannot be kept.
        """
        able = [(layer, group) for layer in sorted(counts) for group in range(counts[layer])]
        if isinstance(self.keep, tuple):
            named = [(layer % num_layers if -num_layers <= layer < num_layers else layer, g) for layer, g in self.keep]
            for layer, group in named:
                if layer not in counts:
                    raise InputError(
                        f"plan.heads.keep: layer {layer} has no heads to keep: it must be converted to a mixer between "
                        f"the projections (lolcats, sliding_window, gla); such layers are {sorted(counts)}"
                    )
                if (layer, group) not in able:
                    raise InputError(
                        f"plan.heads.keep: group {group} of layer {layer} given, it has {counts[layer]} key/value "
                        f"groups: allowed are 0 to {counts[layer] - 1}"
                    )
            if len(set(named)) < len(named):
                raise InputError(f"plan.heads.keep: {[list(x) for x in self.keep]} names a group twice; name it once")
            kept = named
        else:
            total = len(able)
            count = self.keep if isinstance(self.keep, int) else max(1, rounded(self.keep * total))
            if count > total:
                raise InputError(
                    f"plan.heads.keep: {count} given, converted layers between the projections have {total} key/value "
                    f"groups: give at most {total}"
                )
            if scores is None:
                kept = [able[(2 * i + 1) * total // (2 * count)] for i in range(count)]
            else:
                kept = sorted(able, key=lambda place: -scores[place])[:count]
        by_layer: dict[int, list[int]] = {}
        for layer, group in sorted(kept):
            by_layer.setdefault(layer, []).append(group)
        return by_layer


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_place(value: object) -> bool:
    """Whether this is `[layer, group]`."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_int, value)) and value[1] >= 0
