"""A conversion by several processes: which recipes they can run, what must be the same for all, and sharded models."""

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
from linearize.recipes.schema import Recipe
from linearize.training.data.specs import input_paths
from linearize.training.data.token_cache import content_checksum, token_cache
from linearize.training.distributed import Group
from linearize.version import __version__


def check_processes(recipe: Recipe, group: Group) -> None:
    """Refuse a recipe that this many processes cannot run; a single process can run any.

    Raises:
        InputError: quantized base weights, or a batch that does not divide by the number of processes.
    """
    if group.ranks == 1:
        return
    if recipe.base_weights != "full":
        raise InputError(
            f"base_weights {recipe.base_weights} is for one process: set base_weights=full, the processes of torchrun "
            "share the weights"
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


def run_signature(teacher: str, specs: Sequence[str], recipe: Recipe, out: Path) -> dict[str, str]:
    """What must be the same for every process, as texts for messages: versions, recipe, teacher, data, folder."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {
        "versions": ", ".join(f"{name} {number}" for name, number in {"linearize": __version__, **versions}.items()),
        "recipe": f"one with checksum {_checksum(json.dumps(recipe.model_dump(mode='json'), sort_keys=True).encode())}",
        "teacher": f"{teacher} ({_file(Path(teacher) / 'config.json')})",
        "data": ", ".join(f"{spec} ({_files(input_paths(spec))})" for spec in specs),
        "output folder": str(out),
    }


def shard_models(prepared: Prepared, group: Group, device: str | None) -> Prepared:
    """Shard the weights of teacher and student over all processes; a single process keeps them as they are."""
    if group.ranks == 1:
        return prepared
    target = pick_device(device)
    if target.type == "cuda":
        target = torch.device("cuda", torch.cuda.current_device())
    shards = Shards(target)
    models = (prepared.student, prepared.layer_teacher, prepared.teacher)
    shards.place([model for model in models if model is not None])
    set_shards(prepared.student, shards)
    heldout = [{name: x.to(target) for name, x in batch.items()} for batch in prepared.heldout]
    return replace(prepared, heldout=heldout)


def _file(path: Path) -> str:
    if not path.is_file():
        return "no file"
    with path.open("rb") as file:
        return f"checksum {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


def _files(paths: Sequence[Path]) -> str:
    """The checksum of one file; of several, and of a folder, the number of files and their sizes."""
    if len(paths) == 1 and paths[0].is_file():
        return f"checksum {content_checksum(paths[0], token_cache())[:12]}"
    files = [file for path in paths for file in ((path,) if path.is_file() else sorted(path.glob("*")))]
    sizes = [(file.name, file.stat().st_size) for file in files if file.is_file()]
    return f"{len(sizes)} files, checksum {_checksum(repr(sizes).encode())}" if sizes else "no file"


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
