"""Speculative sampling: tokens follow the target's distribution exactly, and a wrong rule is detected."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from speculation_cases import chi_square, endless, near
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

import linearize.decoding.speculative.loop as loop
from linearize.decoding import LookupDrafter, speculate
from linearize.decoding.speculative.verify import verify_greedy, verify_sampled

VOCABULARY, PROMPT, ROWS = 5, [3, 4, 1, 3, 2, 4, 1], 2000
WRONG = 6.0  # normal deviates: chance gives one such run in a thousand million
SETTINGS: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 4}


def tables(seed: int, *shape: int) -> Tensor:
    """Random distributions over the last dimension."""
    return (1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def first_tokens(q_KV: Tensor | None, rule: Any) -> float:
    """How far the first token of a round is from p after 20,000 rounds with three draft tokens."""
    rows, p_TV = 20000, tables(1, 4, 7)
    generator = torch.Generator().manual_seed(2)
    if q_KV is None:
        draft_BK = torch.tensor([[4, 1, 5]]).expand(rows, -1)
    else:
        draft_BK = torch.multinomial(q_KV, rows, replacement=True, generator=generator).T
    q_BKV = None if q_KV is None else q_KV.expand(rows, -1, -1)
    kept, following = rule(p_TV.expand(rows, -1, -1), draft_BK, q_BKV, generator)
    assert {1, 2, 3} <= set(kept)
    firsts = [int(draft_BK[i, 0]) if kept[i] else following[i] for i in range(rows)]
    return chi_square([firsts.count(token) for token in range(7)], p_TV[0].tolist())


def test_a_round_follows_the_target() -> None:
    assert abs(first_tokens(tables(3, 3, 7), verify_sampled)) < WRONG
    assert abs(first_tokens(None, verify_sampled)) < WRONG


def too_kind(p: Tensor, draft: Tensor, q: Tensor | None, generator: torch.Generator) -> Any:
    """Accepts draft tokens more often than p / q."""
    softer = torch.cat([p[:, :-1].sqrt(), p[:, -1:]], dim=1)
    return verify_sampled(softer, draft, q, generator)


def no_residual(p: Tensor, draft: Tensor, q: Tensor | None, generator: torch.Generator) -> Any:
    """Draws from p after a rejection, where it should be from the positive part of p - q."""
    kept, _ = verify_sampled(p, draft, q, generator)
    after = p.gather(1, torch.tensor(kept)[:, None, None].expand(-1, -1, p.shape[-1]))[:, 0]
    return kept, torch.multinomial(after, 1, generator=generator)[:, 0].tolist()


@pytest.mark.parametrize("rule", [too_kind, no_residual])
def test_a_wrong_rule_is_found_out(rule: Any) -> None:
    assert first_tokens(tables(3, 3, 7), rule) > WRONG
    assert first_tokens(None, rule) > WRONG


def test_equal_distributions_keep_every_draft_token() -> None:
    p_BTV, generator = tables(4, 50, 4, 7), torch.Generator().manual_seed(1)
    draft_BK = p_BTV[:, :3].argmax(-1)
    kept, _ = verify_sampled(p_BTV, draft_BK, p_BTV[:, :3], generator)
    assert kept == [3] * 50
    impossible = p_BTV.clone().scatter_(2, torch.cat([draft_BK, draft_BK[:, :1]], 1)[..., None], 0.0)
    kept, following = verify_sampled(impossible, draft_BK, p_BTV[:, :3], generator)
    assert kept == [0] * 50 and all(token != drafted for token, drafted in zip(following, draft_BK[:, 0], strict=True))


def test_greedy_keeps_what_agrees() -> None:
    scores = torch.eye(7)[torch.tensor([[2, 5, 1, 6], [3, 3, 0, 1], [4, 2, 2, 0]])]
    draft = torch.tensor([[2, 5, 1], [3, 1, 0], [5, 2, 2]])
    assert verify_greedy(scores, draft) == ([3, 1, 0], [6, 3, 4])
    assert verify_greedy(scores[:, :1], draft[:, :0]) == ([0, 0, 0], [2, 3, 4])


def small_models() -> tuple[Any, Any]:
    """A hybrid target over five tokens, and a draft that is a good way off."""
    plain = tiny("llama", attention="sdpa", vocab_size=VOCABULARY, num_hidden_layers=2)
    model = endless(student_of(plain, [mixer("gla"), None]))
    return model, near(model, 0.3)


def joint(model: Any) -> dict[tuple[int, ...], float]:
    """The probability of every three tokens after the prompt, by full passes without a cache."""
    rules = LogitsProcessorList([TemperatureLogitsWarper(SETTINGS["temperature"]), TopKLogitsWarper(SETTINGS["top_k"])])
    every = list(itertools.product(range(VOCABULARY), repeat=3))
    ids = torch.tensor([[*PROMPT, *three] for three in every])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, len(PROMPT) - 1 : -1]
    p = torch.stack([rules(ids, logits[:, t]).softmax(-1) for t in range(3)], dim=1)
    chances = p.gather(2, ids[:, len(PROMPT) :, None])[..., 0].prod(1)
    return {three: float(chance) for three, chance in zip(every, chances, strict=True)}


def sampled(model: Any, draft: Any) -> tuple[float, Any]:
    """Three tokens of 2000 rows with one prompt, against the joint distribution."""
    ids, due = torch.tensor([PROMPT]).expand(ROWS, -1), joint(model)
    assert abs(sum(due.values()) - 1) < 1e-4
    result = speculate(
        model, draft, ids, max_new_tokens=3, draft_tokens=2, generation_config=GenerationConfig(**SETTINGS), seed=5
    )
    seen = [tuple(row) for row in result.tokens]
    return chi_square([seen.count(three) for three in due], list(due.values())), result.stats


@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_texts_follow_the_targets_distribution(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft = small_models()
    deviates, stats = sampled(model, draft if kind == "model" else LookupDrafter())
    assert abs(deviates) < WRONG
    assert 0 < stats.accepted < stats.drafted
    monkeypatch.setattr(loop, "verify_sampled", too_kind)
    assert sampled(model, draft if kind == "model" else LookupDrafter())[0] > WRONG


def test_rows_that_keep_equal_numbers_follow_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches in which rows cannot differ: what one row is cut back to does not depend on its own tokens."""
    model, draft = small_models()
    monkeypatch.setattr("linearize.decoding.speculative.cached_model._keeps_by_row", lambda _: False)
    ids, due, seen = torch.tensor([PROMPT]).expand(4, -1), joint(model), []
    for seed in range(120):
        config = GenerationConfig(**SETTINGS)
        run = speculate(model, draft, ids, max_new_tokens=3, draft_tokens=2, generation_config=config, seed=seed)
        seen += [tuple(row) for row in run.tokens]
    assert abs(chi_square([seen.count(three) for three in due], list(due.values()))) < WRONG


def test_the_seed_is_followed_and_nothing_else_touched() -> None:
    model, draft = small_models()
    config, ids = GenerationConfig(do_sample=True, temperature=1.3), text(1, 9) % VOCABULARY

    def run(seed: int) -> list[list[int]]:
        return speculate(
            model, draft, ids, max_new_tokens=20, draft_tokens=3, generation_config=config, seed=seed
        ).tokens  # fmt: skip

    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert run(1) == run(1) != run(2)
    assert torch.equal(before, torch.get_rng_state())
    cold = GenerationConfig(do_sample=True, temperature=1e-4)
    greedy = speculate(model, draft, ids, max_new_tokens=20, draft_tokens=3).tokens
    assert speculate(model, draft, ids, max_new_tokens=20, draft_tokens=3, generation_config=cold).tokens == greedy
