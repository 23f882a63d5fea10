"""Heads that keep softmax in converted layers: parity with teacher and student, the plan's key, scores by ablation."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from teacher_folder import write_teacher, write_text
from torch import nn
from transformers import AutoTokenizer

import linearize
from linearize.cli.main import main
from linearize.errors import InputError
from linearize.metrics import head_scores as scoring
from linearize.metrics.branches import two_branch_layers, window_reach
from linearize.metrics.head_scores import head_scores
from linearize.mixers.retrieval_heads import RetrievalHeadsConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.export import export_student
from linearize.modeling.inspect import inspect_model
from linearize.modeling.static.step import StaticStep
from linearize.recipes.schema import load_recipe

T = 43
LOLCATS = mixer("lolcats", num_sinks=1, shift="shared")
ALL = RetrievalHeadsConfig(groups=(0, 1, 2), mixer=LOLCATS)


def heads(*groups: int, inner: Any = LOLCATS) -> RetrievalHeadsConfig:
    return RetrievalHeadsConfig(groups=groups, mixer=inner)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gemma2", "deepseek_v3"])
@torch.no_grad()
def test_a_layer_with_all_groups_kept_is_the_teachers(family: str) -> None:
    teacher = tiny(family, **({"layer_types": ["full_attention"] * 3} if family == "gemma2" else {}))
    count = LinearizedForCausalLM.from_teacher(teacher, [LOLCATS] * 3).config.attention_shapes()[0].num_kv_heads
    model = student_of(teacher, heads(*range(count)))
    ids = text(2, T)
    expected = teacher(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=3e-5)
    cache, parts = None, []
    for part in ids.split([9, 1, 1, 30, 2], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=3e-5)


@torch.no_grad()
def test_other_groups_run_the_mixer_as_if_they_were_alone() -> None:
    """The outputs of a kept group are the teacher's, those of any other are the mixer's, head by head."""
    from linearize.ops.layout import Layout
    from linearize.ops.softmax import softmax_attention

    shape = student_of(tiny(), LOLCATS).config.attention_shapes()[0]
    q, k, v = (torch.randn(2, n, T, d, dtype=torch.float64) for n, d in ((6, 10), (3, 10), (3, 10)))
    torch.manual_seed(4)
    both = heads(1).build(shape).double()
    for parameter in both.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    y, _ = both(q, k, v, scaling=0.3, layout=Layout())
    exact = softmax_attention(q, k, v, scaling=0.3, layout=Layout())
    torch.testing.assert_close(y[:, 2:4], exact[:, 2:4])
    assert both.inner is not None
    others = [0, 1, 4, 5]
    alone, _ = both.inner(q[:, others], k[:, [0, 2]], v[:, [0, 2]], scaling=0.3, layout=Layout())
    torch.testing.assert_close(y[:, others], alone)
    assert (alone - exact[:, others]).abs().max() > 1e-2
    linear, _ = both(q, k, v, scaling=0.3, layout=Layout(), branch="linear")
    torch.testing.assert_close(linear[:, 2:4], exact[:, 2:4])
    assert (linear[:, others] - alone).abs().max() > 1e-2


@torch.no_grad()
def test_drafts_and_generated_text_are_those_of_the_plain_loop() -> None:
    teacher = tiny(attention="sdpa")
    model = student_of(teacher, [heads(0), LOLCATS, heads(1, 2)])
    ids = text(1, 20)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    looked_up = model.generate(ids, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4)
    assert looked_up.tolist() == expected.tolist()
    cut = ids
    for _ in range(30):
        cut = torch.cat([cut, model(cut).logits[:, -1:].argmax(-1)], dim=1)
    end = expected.shape[1]
    assert cut[:, :end].tolist() == expected.tolist()


def test_a_folder_says_which_heads_it_keeps(tmp_path: Path) -> None:
    model = student_of(tiny(attention="sdpa"), [heads(0, inner=mixer("lolcats", window=4)), LOLCATS, heads(1, 2)])
    model.save_pretrained(tmp_path)
    loaded = linearize.load(tmp_path)
    ids = text(2, T)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.mixers() == model.config.mixers()
    assert two_branch_layers(loaded.config.mixers()) == [0, 1, 2] and window_reach(loaded.config.mixers()) == 8
    rows = inspect_model(str(tmp_path))["layers"]
    per_token = 2 * 10 * 4  # key and value of 10 fp32 numbers
    assert [row["bytes_per_token"] for row in rows] == [per_token, 0, 2 * per_token]
    stored = linearize.load(tmp_path, store=3)
    assert [entry.inner.store for entry in stored.config.mixers()] == [3, 3, 3]  # type: ignore[union-attr]
    with torch.no_grad():
        assert (stored(ids).logits - model(ids).logits).abs().max() > 1e-3


@torch.no_grad()
def test_heads_of_a_trained_student_are_given_back(tmp_path: Path) -> None:
    """The kept group is exact, and the others run with what they learned."""
    from linearize.ops.layout import Layout
    from linearize.ops.softmax import softmax_attention

    model = student_of(tiny(attention="sdpa"), mixer("lolcats", feature_map="gain", num_sinks=1, shift="shared"))
    q, k, v = (torch.randn(1, n, T, 10) for n in (6, 3, 3))
    call: Any = {"scaling": 0.3, "layout": Layout()}
    before = model.mixers()[1](q, k, v, **call)[0]
    ids = text(1, T)
    logits = model(ids).logits
    model.keep_heads({1: [1], 2: [0, 2]})
    after = model.mixers()[1](q, k, v, **call)[0]
    others = [0, 1, 4, 5]
    torch.testing.assert_close(after[:, others], before[:, others])
    torch.testing.assert_close(after[:, 2:4], softmax_attention(q, k, v, **call)[:, 2:4])
    assert (after[:, 2:4] - before[:, 2:4]).abs().max() > 1e-2
    kept = model(ids).logits
    assert (kept - logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(linearize.load(tmp_path)(ids).logits, kept)
    with pytest.raises(InputError, match="group 5 given"):
        model.keep_heads({0: [5]})
    model.keep_heads({1: [2], 2: [1]})  # more of a layer, and all of one
    more = model.mixers()[1](q, k, v, **call)[0]
    torch.testing.assert_close(more[:, :4], after[:, :4])
    torch.testing.assert_close(more[:, 4:], softmax_attention(q, k, v, **call)[:, 4:])
    assert model.config.mixers()[1].groups == (1, 2) and model.mixers()[2].inner is None
    everything = model(ids).logits
    model.keep_heads({1: [1], 2: [0]})  # those that are kept already: nothing changes
    assert torch.equal(model(ids).logits, everything) and (everything - kept).abs().max() > 1e-3
    ordinary = student_of(tiny(attention="sdpa"), [None, mixer("gated_delta_net"), None])
    with pytest.raises(InputError, match="layer 1 has no heads to give back"):
        ordinary.keep_heads({1: [0]})


def test_what_heads_cannot_be_kept_for_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"group 3 given.*3 key/value heads"):
        student_of(tiny(), heads(3))
    with pytest.raises(ValueError, match="once"):
        heads(1, 1)
    with pytest.raises(InputError, match=r"layer 0 of gemma2 sees the last 5 tokens"):
        student_of(tiny("gemma2"), heads(1))
    model = student_of(tiny(attention="sdpa"), heads(1))
    with pytest.raises(InputError, match=r"layer 0 \(retrieval_heads\).*static cache"):
        StaticStep(model, batch=1, capacity=40)
    with pytest.raises(InputError, match="retrieval_heads"):
        export_student(model, "granite-hybrid", tmp_path / "out")


def keep(value: Any, **others: Any) -> Any:
    return load_recipe("lolcats").override({"plan.heads": {"keep": value}, **others}).plan


def planned(value: Any, counts: list[int], scores: Any = None, **others: Any) -> list[tuple[int, ...]]:
    plan = keep(value, **others)
    placed = plan.with_heads(plan.resolve(len(counts)), counts, scores)
    return [entry.groups if isinstance(entry, RetrievalHeadsConfig) else () for entry in placed]


def test_the_plan_keeps_the_heads_with_the_largest_scores() -> None:
    scores = {(0, 0): 0.1, (0, 1): 3.0, (1, 0): -1.0, (1, 1): 0.2, (2, 0): 2.0, (2, 1): 0.3}
    assert planned(2, [2, 2, 2], scores) == [(1,), (), (0,)]
    assert planned(0.5, [2, 2, 2], scores) == [(1,), (), (0, 1)]
    assert planned(0.01, [2, 2, 2], scores) == [(1,), (), ()]
    assert planned(1.0, [2, 2, 2], scores) == [(0, 1)] * 3
    assert planned([[0, 1], [-1, 0], [-1, 1]], [2, 2, 2]) == [(1,), (), (0, 1)]
    assert sum(map(len, planned(3, [2, 2, 2]))) == 3  # without scores any, for `linearize plan`
    local = {place: score for place, score in scores.items() if place[0] != 2}
    assert planned(2, [2, 2, 0], local) == [(1,), (1,), ()]
    assert not keep([[0, 1]]).heads.needs_scores and keep(1).heads.needs_scores


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7, "7 given.*6 key/value groups"), (0, "allowed"), (1.5, "allowed"), ([], "allowed"), ([[0]], "allowed"),
        ([[0, 2]], "group 2 of layer 0 given.*0 to 1"), ([[3, 0]], "layer 3 has no heads"), ([[0, 0], [0, 0]], "twice"),
        (True, "allowed"),
    ],
)  # fmt: skip
def test_a_wrong_number_of_heads_is_one_line(value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        planned(value, [2, 2, 2])


def test_layers_without_heads_of_their_own_cannot_keep_any() -> None:
    plan = load_recipe("mamba2-in-llama").override({"plan.heads": {"keep": [[0, 1]]}}).plan
    with pytest.raises(InputError, match="layer 0 has no heads to keep"):
        plan.with_heads(plan.resolve(4), [2] * 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    write_teacher(folder / "teacher", max_position_embeddings=400)
    write_text(folder / "text.txt")
    return folder


def ablated(model: Any, ids: list[int], first: int, answer: int, place: tuple[int, int] | None) -> float:
    """The answer's log-probability where one group's part of the output projection's input is 0 from `first` on."""

    def without(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        assert place is not None
        x = args[0].clone()
        x.unflatten(-1, (3, -1))[:, first:, place[1]] = 0
        return (x,)

    hooks = []
    if place is not None:
        hooks = [model.model.layers[place[0]].self_attn.o_proj.register_forward_pre_hook(without)]
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    for hook in hooks:
        hook.remove()
    at = torch.arange(len(ids) - answer, len(ids))
    return float(logits[at - 1, torch.tensor(ids)[at]].sum())


@torch.no_grad()
@pytest.mark.parametrize("rows", [16, 4])
def test_scores_are_those_of_an_output_projection_without_a_group(
    folder: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linearize.modeling.io.teacher import load_teacher

    monkeypatch.setattr(scoring, "ROWS", rows)
    model: Any = load_teacher(str(folder / "teacher"))[0]
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    scored = head_scores(model, tokenizer, prompts=2, length=300, seed=3, without="all")
    rng, falls = random.Random(3), {}
    for _ in range(2):
        listed, question, answer = scoring._prompt(tokenizer, rng, 300)
        assert 250 < len(listed) + len(question) + len(answer) <= 300
        ids = listed + question + answer
        whole = ablated(model, ids, len(listed), len(answer), None)
        for score in scored.heads:
            place = (score.layer, score.group)
            falls[place] = falls.get(place, 0.0) + (whole - ablated(model, ids, len(listed), len(answer), place)) / 2
    assert set(falls) == {(layer, group) for layer in range(3) for group in range(3)}
    for score in scored.heads:
        assert math.isclose(score.fall, falls[score.layer, score.group], rel_tol=1e-3, abs_tol=1e-4)
    assert max(abs(score.fall) for score in scored.heads) > 0.05
    assert head_scores(model, tokenizer, prompts=2, length=300, seed=3, without="all") == scored
    near = head_scores(model, tokenizer, prompts=2, length=300, seed=3)
    assert near.answer == scored.answer and max(abs(score.fall) for score in near.heads) > 0.01
    monkeypatch.setattr(scoring, "WINDOW", 300)  # then nothing is missing
    assert all(abs(score.fall) < 1e-4 for score in head_scores(model, tokenizer, prompts=1, length=300).heads)


def test_groups_that_replace_each_other_are_ranked_together() -> None:
    """One at a time, neither of two that do the same work is missed; both together are."""
    places = [(layer, group) for layer in range(10) for group in range(2)]
    twins, needed, pair = {(3, 0), (3, 1)}, (5, 1), {(7, 0), (8, 1)}

    def answer(ablated: Sequence[tuple[int, int]]) -> float:
        kept = set(places) - set(ablated)
        value = 2.0 * bool(kept & twins) + 3.0 * (needed in kept) + 1.5 * (pair <= kept)
        return value + sum(0.01 * layer for layer, _ in kept)

    def run(rows: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
        return torch.tensor([answer(row) for row in rows], dtype=torch.float64)

    runs: Any = [run, run]
    alone = {place: answer(()) - answer([place]) for place in places}
    assert max(alone[place] for place in twins) < 0.04 < min(alone[place] for place in (needed, *pair))
    ranked = scoring._eliminated(runs, places, places)
    assert sorted(ranked) == sorted(places)
    assert ranked[0] == needed and len(twins & set(ranked[:4])) == 1 and pair <= set(ranked[:4])
    assert scoring._eliminated(runs, places, [(0, 0), needed]) == [needed, (0, 0)]
    assert scoring._sizes(18)[:3] == [16, 14, 13] and scoring._sizes(18)[-1] == 1 and scoring._sizes(1) == []


def test_the_command_ranks_the_groups_and_draws_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plots = folder / "plots"
    assert main(["inspect", str(folder / "teacher"), "--heads", "--plot", str(plots), "--device", "cpu", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in scored["heads"]] == list(range(9))
    assert min(scored["heads"], key=lambda row: row["fall"])["rank"] == 8  # the pool is 8 of 9
    assert {path.name for path in plots.iterdir()} == {"heads.svg", "heads.png"}
    for wrong in (["--heads", "--sensitivity"], ["--plot", str(plots)], ["--heads", "--tokens", "9"]):
        assert main(["inspect", str(folder / "teacher"), *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_conversion_keeps_the_heads_that_score_most(folder: Path, tmp_path: Path) -> None:
    settings = {
        "plan.mixer.window": 4, "plan.mixer.feature_dim": 4, "plan.heads.keep": 2, "data.length": 32,
        "stages.0.tokens": 64, "stages.1.tokens": 64, "stages.0.batch": 2, "stages.1.batch": 2,
    }  # fmt: skip
    out = tmp_path / "student"
    linearize.convert(
        str(folder / "teacher"), out=out, data=[str(folder / "text.txt")], recipe="lolcats", overrides=settings,
        device="cpu",
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    ranks = {(row["layer"], row["group"]): row["rank"] for row in report["provenance"]["head_scores"]}
    best = sorted(sorted(ranks, key=ranks.__getitem__)[:2])
    mixers = linearize.load(out).config.mixers()
    kept = [(i, group) for i, entry in enumerate(mixers) for group in getattr(entry, "groups", ())]
    assert kept == best


def test_window_dropout_leaves_the_linear_branch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is that of the layers drawn; a held-out loss is the whole student's."""
    from test_stages import make_batch

    from linearize.training.stages.distill import DistillConfig
    from linearize.training.stages.lowrank import LowRankConfig
    from linearize.training.stages.window_dropout import draw_branches

    teacher, batch = tiny(), make_batch()
    student = student_of(teacher, [LOLCATS, None, heads(1)])
    for config in (
        DistillConfig(tokens=1, lr=1e-2, kl=0.5, ce=0.5, window_dropout=0.5),
        LowRankConfig(tokens=1, lr=1e-2, window_dropout=[0.5]),
    ):
        run: Any = config.build(student, teacher)
        torch.manual_seed(0)
        losses = {round(float(run.loss(batch).sum.detach()), 4) for _ in range(30)}
        assert len(losses) == 4  # each of the two layers with or without its window
        assert len({round(float(run.heldout_loss(batch).sum.detach()), 4) for _ in range(5)}) == 1
        run.finish()
    torch.manual_seed(1)
    for progress, low, high in ((0.0, 0.85, 0.95), (0.34, 0.7, 0.8), (0.99, 0.45, 0.55)):
        drawn = sum(len(draw_branches((0.9, 0.75, 0.5), range(50), progress)) for _ in range(60)) / 3000
        assert low < drawn < high
    assert draw_branches((1.0,), [1, 4], 0.5) == {1: "linear", 4: "linear"} and not draw_branches((), [1], 0.5)
    alone = student_of(teacher, mixer("sliding_window"))
    with pytest.raises(InputError, match=r"window_dropout.*sliding_window"):
        LowRankConfig(tokens=1, lr=1e-2, window_dropout=0.5).check(alone, teacher)
