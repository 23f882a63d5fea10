"""Many processes where something goes wrong: one line, one exit code, nothing half-written, and the same command
goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import test_distributed
from many import command, together
from test_distributed import STAGE, WHOLE, argv, differences

from linearize.conversion.distributed import check_processes
from linearize.errors import InputError
from linearize.recipes.schema import Recipe
from linearize.training.distributed import Group

folder = test_distributed.folder  # a fixture
BASE = {**WHOLE, "plan": {"mixer": {"name": "mamba2"}}}
DISTILL = {"name": "distill", **STAGE, "tokens": 4 * 64 * 6, "train": "all", "kl": 1.0}


def own_arguments(arguments: list[list[str]], output: Path) -> int:
    """The command with this rank's own arguments."""
    return command(arguments[int(os.environ["RANK"])], output)


def broken(arguments: list[str], output: Path, rank: int, step: int, death: bool) -> int:
    """The command on a rank that raises, or is killed, when it begins a step."""
    from linearize.training.step import Stepper

    original = Stepper.step

    def fail(self: Any, *args: Any, number: int, **rest: Any) -> Any:
        if int(os.environ["RANK"]) == rank and number == step:
            if death:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("broken on purpose")
        return original(self, *args, number=number, **rest)

    Stepper.step = fail  # type: ignore[method-assign]
    return command(arguments, output)


def lines_by_rank(output: Path) -> dict[int, list[str]]:
    """Lines of errors by rank."""
    results = {int(p.suffix[1:]): p.read_text().splitlines() for p in output.parent.glob(f"{output.name}.err.*")}
    return {rank: own for rank, lines in results.items() if (own := [x for x in lines if x.startswith("linearize: ")])}


def test_ranks_with_different_recipes_are_refused(folder: Path) -> None:
    arguments = [argv(folder, "whole", "odd"), argv(folder, "whole", "odd", "--set", "stages.0.lr=0.5")]
    assert together(2, own_arguments, arguments, folder / "odd-recipes") == [2, 2]
    lines = lines_by_rank(folder / "odd-recipes")
    assert len(lines) == 1
    (line,) = next(iter(lines.values()))
    assert "do not have the same recipe" in line and "start all of them with the same command" in line
    assert not [path for path in folder.iterdir() if path.name.strip(".").startswith("odd") and path.is_dir()]


def test_bad_input_on_one_rank_ends_all(folder: Path) -> None:
    arguments = [argv(folder, "whole", "odd"), argv(folder, "missing", "odd")]
    assert together(2, own_arguments, arguments, folder / "missing-recipe") == [2, 2]
    lines = lines_by_rank(folder / "missing-recipe")
    assert list(lines) == [1] and len(lines[1]) == 1 and "missing.yaml" in lines[1][0]


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_with_its_line(folder: Path) -> None:
    arguments = argv(folder, "whole", "wrong")
    assert together(2, broken, arguments, folder / "wrong", 1, 1, False) == [1, 1]
    lines = lines_by_rank(folder / "wrong")
    assert list(lines) == [1] and lines[1] == [
        "linearize: failed: RuntimeError: broken on purpose (add --debug for a traceback)"
    ]
    assert not (folder / "wrong").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_same_command_continues_also_alone(folder: Path) -> None:
    (folder / "distill.yaml").write_text(json.dumps({**BASE, "stages": [DISTILL]}))
    for out in ("unbroken", "again", "alone"):
        words = argv(folder, "distill", out)
        if out == "again":
            codes = together(2, broken, words, folder / "killed", 1, 5, True)
            assert codes == [1, None] and not (folder / out).exists()
            left = folder / f".{out}.run"
            assert (left / "0-distill" / "checkpoint-2").is_dir(), "sharded weights in a folder"
            shutil.copytree(left, folder / ".alone.run")
        ranks = 1 if out == "alone" else 2
        assert together(ranks, command, words, folder / out) == [0] * ranks
    for out in ("again", "alone"):
        assert "resumes after step 4 of 6" in (folder / f"{out}.err.0").read_text()
        result = differences(folder / "unbroken", folder / out)
        assert result.pop("weights") <= (1e-6 if out == "again" else 1e-3), result
        assert max(result.values()) < 1e-5, result


@pytest.mark.slow
def test_a_damaged_part_of_a_checkpoint_is_not_trained_on(folder: Path) -> None:
    (folder / "distill.yaml").write_text(json.dumps({**BASE, "stages": [DISTILL]}))
    words = argv(folder, "distill", "damaged")
    assert together(2, broken, words, folder / "damaged", 0, 5, True) == [None, 1]
    newest = folder / ".damaged.run" / "0-distill" / "checkpoint-2"
    part = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with part.open("r+b") as file:
        file.seek(part.stat().st_size // 2)
        file.write(b"\xff\x00\xff")
    assert together(2, command, words, folder / "mended") == [0, 0]
    assert "resumes after step 2 of 6" in (folder / "mended.err.0").read_text()


def test_other_commands_are_for_one_process(folder: Path) -> None:
    assert together(2, command, ["inspect", str(folder / "teacher")], folder / "other") == [2, 2]
    lines = lines_by_rank(folder / "other")
    assert len(lines) == 1 and "inspect runs in one process" in next(iter(lines.values()))[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"batch": 4}, "stages.0: batch 4 of hidden_alignment does not divide by 3 processes"),
        ({"name": "dpo", "data": "x.jsonl", "batch": 7}, "stages.0: batch 7 of dpo does not divide by 3 processes"),
    ],
)
def test_recipes_that_so_many_processes_cannot_run(change: dict[str, Any], expected: str) -> None:
    stage: dict[str, Any] = {"name": "hidden_alignment", "tokens": 64, "lr": 0.1, **change}
    recipe = Recipe.model_validate({"name": "own", **BASE, "stages": [stage]})
    check_processes(recipe, Group())
    with pytest.raises(InputError, match="base_weights 8bit is for one process"):
        check_processes(recipe.model_copy(update={"base_weights": "8bit"}), Group(ranks=3))
    with pytest.raises(InputError, match=expected):
        check_processes(recipe, Group(rank=1, ranks=3))
    blocks = recipe.override(
        {"stages.0": {"name": "hidden_alignment", "tokens": 64, "lr": 0.1, "batch": 4, "block": 1}}
    )
    check_processes(blocks, Group(rank=1, ranks=3))  # a block is trained by one process
