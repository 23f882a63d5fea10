"""`sft` and `dpo` by two processes: losses, margins and weights of one; a killed rank, and the same command again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_distributed
import yaml
from many import command, together
from test_distributed import BETWEEN, STAGE, argv, differences
from test_distributed_faults import broken, lines_by_rank

text = test_distributed.folder  # a fixture: a teacher and text

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "one", "more")
COMMON = {"lr": 0.003, "batch": 6, "evaluate_every": 2, "chat_template": "plain", "length": 40, "micro_batch": 2}
MOVED = {"rewards/margins": 1e-3, "mean_token_accuracy": 0.0}


def stages(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Weights that are whole and sharded, trained and not; shares of 3 rows in micro-batches of 2 and 1."""
    sft = {"name": "sft", "data": str(folder / "answers.json"), "epochs": 2, **COMMON}
    dpo = {"name": "dpo", "data": str(folder / "pairs.json"), "epochs": 2, "beta": 0.4, **COMMON}
    return {
        "aligned": [
            {"name": "hidden_alignment", **STAGE},
            {**sft, "gradient_checkpointing": True},
            {**dpo, "train": "mixers", "loss": "ipo"},
            {**dpo, "gradient_checkpointing": True},
        ],
        "preferred": [dpo],
    }


@pytest.fixture(scope="module")
def folder(text: Path) -> Path:
    """With recipes, 10 answers and 8 preferences: the last batch of an epoch goes on with the next one."""
    rows = [(WORDS[n % 9], " ".join(WORDS[n % 5 : n % 5 + 1 + n % 4]), f"{n * 37} {WORDS[n % 7]}") for n in range(10)]
    answers = [{"prompt": f"{asked} ", "completion": f"{good}."} for asked, good, _ in rows]
    pairs = [{"prompt": f"{asked} ", "chosen": f"{good}.", "rejected": bad} for asked, good, bad in rows[:8]]
    (text / "answers.json").write_text(json.dumps(answers))
    (text / "pairs.json").write_text(json.dumps(pairs))
    for name, chosen in stages(text).items():
        (text / f"{name}.yaml").write_text(yaml.safe_dump({**BETWEEN, "stages": chosen}))
    return text


def metric_differences(one: Path, other: Path) -> dict[str, float]:
    """The largest difference of each metric of each stage."""
    a, b = (json.loads((path / "report.json").read_text())["stages"] for path in (one, other))
    results: dict[str, float] = {}
    for number, (x, y) in enumerate(zip(a, b, strict=True)):
        for key, history in x["details"].get("metrics", {}).items():
            if key == "rewards/accuracies":
                continue  # the signs of margins; that of one that is zero but for rounding may be either
            pairs = zip(history, y["details"]["metrics"][key], strict=True)
            results[f"{number} {key}"] = max(abs(p[1] - q[1]) for p, q in pairs)
            moved = max(p[1] for p in history) - min(p[1] for p in history)
            assert moved > MOVED.get(key, -1.0), f"{key} of stage {number} says nothing"
    return results


@pytest.mark.slow
def test_losses_and_margins_are_those_of_one_process(folder: Path) -> None:
    for ranks in (1, 2):
        assert together(ranks, command, argv(folder, "aligned", f"al-{ranks}"), folder / f"al{ranks}") == [0] * ranks
    result = differences(folder / "al-1", folder / "al-2")
    weights, metrics = result.pop("weights"), metric_differences(folder / "al-1", folder / "al-2")
    assert {"1 mean_token_accuracy", "2 rewards/margins", "3 logps/chosen"} <= metrics.keys()
    assert max(result.values()) < 1e-5, result
    assert max(metrics.values()) < 3e-5, metrics  # log-probabilities of whole answers, -40 and the like, among them
    assert 0 < weights < 1e-3
    tokens = [
        [x["tokens"] for x in json.loads((folder / f"al-{n}" / "report.json").read_text())["stages"]] for n in (1, 2)
    ]
    assert tokens[0] == tokens[1]
    assert not any((folder / f"al2.{kind}.1").read_text() for kind in ("out", "err"))


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_same_command_continues(folder: Path) -> None:
    for out in ("kept", "again"):
        words = argv(folder, "preferred", out)
        if out == "again":
            assert together(2, broken, words, folder / "killed", 1, 2, True) == [1, None]
            assert (folder / f".{out}.run" / "0-dpo" / "checkpoint-1").is_dir(), "sharded weights in a folder"
        assert together(2, command, words, folder / out) == [0, 0]
    assert "resumes after step 2 of 3" in (folder / "again.err.0").read_text()
    assert max(differences(folder / "kept", folder / "again").values()) == 0


def test_a_batch_that_does_not_divide_and_data_that_cannot_be_read(folder: Path) -> None:
    changes = {"batch": "stages.0.batch=5", "data": f"stages.0.data={folder / 'none.json'}"}
    expected = {"batch": "batch 5 of dpo does not divide by 2 processes", "data": "none.json"}
    for name, setting in changes.items():
        words = argv(folder, "preferred", name, "--set", setting)
        assert together(2, command, words, folder / name) == [2, 2]
        lines = lines_by_rank(folder / name)
        assert len(lines) == 1 and expected[name] in next(iter(lines.values()))[0]
