"""Layer sensitivity: each layer replaced alone, against the same thing done by hand; and the command that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_convert
import torch
from models import LAYERS, mixer, text, tiny
from torch import Tensor

from linearize.cli.main import main
from linearize.errors import InputError
from linearize.metrics.sensitivity import LayerScore, layer_sensitivity
from linearize.modeling import LinearizedForCausalLM

folder = test_convert.folder  # a fixture: a teacher with its tokenizer, and text


def batch(rows: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Two documents a row, of unequal length; the first token of each has no label."""
    ids = text(rows, tokens, seed)
    cut = tokens // 3
    positions = torch.cat([torch.arange(cut), torch.arange(tokens - cut)]).expand(rows, -1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


BATCHES = [batch(3, 23, 1), batch(2, 23, 2)]


def by_hand(teacher: Any, student: Any) -> tuple[float, float]:
    """Mean KL(teacher||student) and next-token loss over the tokens that count, in fp64."""
    kl, loss = [], []
    for one in BATCHES:
        inputs = {name: one[name] for name in ("input_ids", "position_ids")}
        with torch.no_grad():
            p, q = (m(**inputs, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (teacher, student))
        expected = one["labels"][:, 1:]
        kl.append((p.exp() * (p - q)).sum(-1)[expected != -100])
        loss.append(-q.gather(-1, expected.clamp(min=0)[..., None])[..., 0][expected != -100])
    return float(torch.cat(kl).mean()), float(torch.cat(loss).mean())


@pytest.mark.parametrize("config", [mixer("lolcats"), mixer("mamba2")], ids=["lolcats", "mamba2"])
def test_scores_are_those_of_a_bare_swap_of_one_layer(config: Any) -> None:
    teacher = tiny("llama")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    scores = layer_sensitivity(teacher, config, BATCHES)
    assert [score.layer for score in scores] == list(range(LAYERS))
    for score in scores:
        torch.manual_seed(0)
        plan = [config if layer == score.layer else None for layer in range(LAYERS)]
        expected = by_hand(teacher, LinearizedForCausalLM.from_teacher(teacher, plan))
        assert (score.kl, score.loss) == pytest.approx(expected, rel=1e-4)
    assert len({score.kl for score in scores}) == LAYERS and all(score.kl > 1e-3 for score in scores)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_chosen_layers_score_the_same_and_draw_nothing() -> None:
    teacher, config = tiny("llama"), mixer("mamba2")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    some = layer_sensitivity(teacher, config, BATCHES, layers=[2, 0])
    assert torch.equal(torch.rand(3), expected), "the generator is where it was"
    every = layer_sensitivity(teacher, config, BATCHES)
    assert some == [every[2], every[0]] and layer_sensitivity(teacher, config, BATCHES, layers=[]) == []


def test_a_layer_that_stays_as_it_is_costs_nothing() -> None:
    scores = layer_sensitivity(tiny("gemma3_text"), mixer("lolcats", window=8), BATCHES)  # layers 0 and 2 see 5 tokens
    assert [score.kl == 0 for score in scores] == [True, False, True]


def test_calibration_is_part_of_the_score() -> None:
    teacher = tiny("llama")
    copied, calibrated = (
        layer_sensitivity(teacher, mixer("gated_delta_net", initialise=how), BATCHES) for how in ("copy", "calibrate")
    )
    assert all(one.kl != other.kl for one, other in zip(copied, calibrated, strict=True))


def test_a_mixer_that_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be calibrated"):
        layer_sensitivity(tiny("llama"), mixer("retention", initialise="calibrate"), BATCHES)


# the command


def inspect(folder: Path, *options: str) -> list[str]:
    data = ["--data", str(folder / "text.txt")]
    return ["inspect", str(folder / "teacher"), "--sensitivity", *data, "--recipe", str(folder / "tiny.yaml"), *options]


def test_the_command_prints_every_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(inspect(folder, "--tokens", "200", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["mixer"], result["tokens"]) == ("lolcats", 200)
    scores = [LayerScore(**row) for row in result["layers"]]
    assert [score.layer for score in scores] == [0, 1, 2] and all(score.kl > 0 for score in scores)
    assert main(inspect(folder, "--tokens", "200")) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.strip() and line.split()[0] in "012"]
    assert len(shown) == 3 and all(f"{score.kl:.4f}" in line for score, line in zip(scores, shown, strict=True))
    bars = [line.count("#") for line in shown]
    most = max(scores, key=lambda score: score.kl)
    assert bars[most.layer] == 30 and bars == [round(30 * score.kl / most.kl) for score in scores]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sensitivity"], "--data"),
        (["--tokens", "5"], "--sensitivity"),
        (["--sensitivity", "--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_is_missing_is_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["inspect", str(folder / "teacher"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1]


def test_a_conversion_chooses_by_the_same_scores(folder: Path) -> None:
    from linearize.conversion.inspections import inspect_sensitivity
    from linearize.conversion.prepare import prepare
    from linearize.recipes.schema import load_recipe

    recipe = load_recipe(folder / "tiny.yaml").override({"plan.layers": {"keep": 0.34, "select": "sensitivity"}})
    prepared = prepare(str(folder / "teacher"), recipe, [str(folder / "text.txt")], device="cpu")
    shown = inspect_sensitivity(str(folder / "teacher"), data=[str(folder / "text.txt")], recipe=recipe, device="cpu")
    assert [score.kl for score in prepared.scores] == [row["kl"] for row in shown["layers"]]
    kept = [layer for layer, entry in enumerate(prepared.plan) if entry is None]
    assert kept == [max(prepared.scores, key=lambda score: score.kl).layer]
    held_out = {tuple(row) for one in prepared.heldout for row in one["input_ids"].tolist()}
    sample = prepared.text.sample(recipe.data.length, 10**6, 8)
    assert held_out.isdisjoint(tuple(row) for one in sample for row in one["input_ids"].tolist())
