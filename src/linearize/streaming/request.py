"""What a person asks of a conversion, before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.files import check_apart, real_name
from linearize.recipes.base_weights import checked_base
from linearize.recipes.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from linearize.streaming.options import BlockOptions, check_options, has_later
from linearize.streaming.work_folder import work_folder
from linearize.training.data import PSEUDO


@dataclass(frozen=True, kw_only=True)
class Request:
    """`teacher`: folder or Hub name. `specs`: of the data. `asked`: the recipe keys that were overridden. `final`: the
    student's folder, `work`: the one of the run."""

    teacher: str
    specs: list[str]
    recipe: Recipe
    asked: frozenset[str]
    options: BlockOptions
    final: Path
    work: Path

    @property
    def wanted(self) -> dict[str, Any]:
        """What tells this conversion from others with the same folder, as JSON; places by their real paths."""
        recipe = self.recipe.model_dump(mode="json")
        for stage, fields in zip(self.recipe.stages, recipe["stages"], strict=True):
            fields |= {place: real_name(fields[place]) for place in stage.places if fields[place] is not None}
        return {"teacher": real_name(self.teacher), "data": [_real_spec(spec) for spec in self.specs], "recipe": recipe}


def read_request(
    teacher: str | os.PathLike[str],
    *,
    data: Sequence[str | os.PathLike[str]] | str,
    out: str | os.PathLike[str],
    recipe: str | Recipe,
    overrides: Mapping[str, Any] | None,
    options: BlockOptions | None,
) -> Request:
    """The arguments of a conversion, as far as they can be checked by themselves. Raises InputError."""
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = chosen.override(dict(overrides or {}))
    checked_base(chosen)
    blocks = options or BlockOptions()
    check_options(chosen.stages, blocks)
    final = Path(out).expanduser().resolve()
    specs = [data] if isinstance(data, str) else [str(spec) for spec in data]
    check_apart(final, str(teacher), *(spec.removeprefix(PSEUDO) for spec in specs))
    return Request(
        teacher=str(teacher), specs=specs, recipe=chosen, asked=frozenset(overrides or ()), options=blocks, final=final,
        work=work_folder(final),
    )  # fmt: skip


def _real_spec(spec: str) -> str:
    """A SPEC of data by the real path of its file."""
    prefix = PSEUDO if spec.startswith(PSEUDO) else ""
    return prefix + real_name(spec.removeprefix(prefix))


def more_than_blocks(recipe: str | Recipe | None, overrides: Mapping[str, Any] | None) -> bool:
    """Whether stages on the whole model follow the block-wise ones of a recipe. Raises InputError."""
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe or DEFAULT_RECIPE)
    return has_later(chosen.override(dict(overrides or {})).stages)
