"""A conversion by many processes: what cannot be done so, what all must know alike, and the models shared out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from linearize.conversion.prepare import Prepared
from linearize.decoding.loading import pick_device
from linearize.errors import InputError
from linearize.modeling.sharding import Shards, set_shards
from linearize.recipes.recipe import Recipe
from linearize.training.data.loading import PSEUDO
from linearize.training.distributed import Group
from linearize.version import __version__


def check_together(recipe: Recipe, group: Group) -> None:
    """Refuse a recipe that this many processes cannot run; a process alone can run any.

    Raises:
        InputError: base weights in 8 bits, a batch that does not divide.
    """
    if group.ranks == 1:
        return
    if recipe.base_weights != "full":
        raise InputError(
            f"base_weights {recipe.base_weights} is for one process: set base_weights=full, torchrun's processes share "
            "the weights out"
        )
    for number, stage in enumerate(recipe.stages):
        if stage.tokens == 0:
            continue
        if getattr(stage, "block", None) is not None:
            continue  # every block is trained by one process
        if stage.batch % group.ranks:
            raise InputError(
                f"stages.{number}: batch {stage.batch} of {stage.name} does not divide by {group.ranks} processes: set "
                f"stages.{number}.batch to a multiple"
            )


def facts(teacher: str, specs: Sequence[str], recipe: Recipe, out: Path) -> dict[str, str]:
    """What must be the same for every process, in the words of a message: versions, recipe, teacher, data, folder."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {
        "versions": ", ".join(f"{name} {number}" for name, number in {"linearize": __version__, **versions}.items()),
        "recipe": f"one with checksum {_checksum(json.dumps(recipe.model_dump(mode='json'), sort_keys=True).encode())}",
        "teacher": f"{teacher} ({_file(Path(teacher) / 'config.json')})",
        "data": ", ".join(f"{spec} ({_file(Path(spec.removeprefix(PSEUDO)))})" for spec in specs),
        "output folder": str(out),
    }


def share_out(prepared: Prepared, group: Group, device: str | None) -> Prepared:
    """The weights of teacher and student brought to all processes, sharded; as they are where there is one process."""
    if group.ranks == 1:
        return prepared
    where = pick_device(device)
    if where.type == "cuda":
        where = torch.device("cuda", torch.cuda.current_device())
    shards = Shards(where)
    models = (prepared.student, prepared.layer_teacher, prepared.teacher)
    shards.place([model for model in models if model is not None])
    set_shards(prepared.student, shards)
    heldout = [{name: x.to(where) for name, x in batch.items()} for batch in prepared.heldout]
    return replace(prepared, heldout=heldout)


def _file(path: Path) -> str:
    if not path.is_file():
        return "no file"
    with path.open("rb") as file:
        return f"checksum {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
