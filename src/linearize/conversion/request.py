"""What a person asks of a conversion, checked as far as it can be before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.conversion.base_weights import checked_base
from linearize.conversion.options import BlockOptions, check_options, has_later
from linearize.conversion.work_folder import work_folder
from linearize.numbers import parse_size
from linearize.recipes.recipe import Recipe, load_recipe
from linearize.storage.files import check_apart, expand_home, real_name
from linearize.training.data.loading import PSEUDO, local_spec


@dataclass(frozen=True, kw_only=True)
class Request:
    """`teacher`: folder or Hub name. `specs`: of the data. `asked`: the recipe keys that were overridden. `stream`: the
    teacher's weights are read block by block. `final`: the student's folder, `work`: the one of the run."""

    teacher: str
    specs: list[str]
    recipe: Recipe
    asked: frozenset[str]
    options: BlockOptions
    stream: bool
    overwrite: bool
    device: str | None
    trust_remote_code: bool
    final: Path
    work: Path

    @property
    def only_blocks(self) -> bool:
        """Whether some blocks are trained and no student is made."""
        return self.options.only is not None

    @property
    def needs_whole(self) -> bool:
        """Whether a student is made in memory: where weights are read block by block, for later stages alone."""
        return not self.only_blocks and (not self.stream or has_later(self.recipe.stages))

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
    blocks: str | None,
    stream: bool,
    memory: int | str | None,
    disk: int | str | None,
    overwrite: bool,
    device: str | None,
    trust_remote_code: bool,
) -> Request:
    """The arguments of `convert`, as far as they can be checked by themselves. Raises InputError."""
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = chosen.override(dict(overrides or {}))
    checked_base(chosen)
    bounds = {name: None if size is None else parse_size(size) for name, size in (("memory", memory), ("disk", disk))}
    options = BlockOptions(only=blocks, **bounds)
    check_options(chosen.stages, options)
    final, teacher = Path(expand_home(out)).resolve(), expand_home(teacher)
    specs = [local_spec(str(spec)) for spec in ([data] if isinstance(data, str) else data)]
    check_apart(final, teacher, *(spec.removeprefix(PSEUDO) for spec in specs))
    return Request(
        teacher=teacher, specs=specs, recipe=chosen, asked=frozenset(overrides or ()), options=options,
        stream=stream, overwrite=overwrite, device=device, trust_remote_code=trust_remote_code, final=final,
        work=work_folder(final),
    )  # fmt: skip


def _real_spec(spec: str) -> str:
    """A SPEC of data by the real path of its file."""
    prefix = PSEUDO if spec.startswith(PSEUDO) else ""
    return prefix + real_name(spec.removeprefix(prefix))
