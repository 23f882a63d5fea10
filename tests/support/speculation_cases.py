"""Targets and drafts for the tests of speculative decoding: tiny, random, and drafts that are right only at times."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from models import mixer, student_of, tiny
from torch import Tensor, nn

from linearize.decoding.speculative import SpeculationStats

MIXED = ["lolcats", "mamba2", "gated_delta_net"]
NAMES = ["softmax", "local", "mixed", "lolcats", "sliding_window", "gla", "mamba", "mamba2", "gated_delta_net",
         "retention", "store"]  # fmt: skip


def target(name: str) -> Any:
    """A model by name: a plain one, a student with a mixer in all layers but one, or three mixers in one."""
    plain = tiny("mistral" if name == "local" else "llama", attention="sdpa")
    if name in ("softmax", "local"):
        return endless(plain)
    made = mixer(num_sinks=1, store=5) if name == "store" else None if name == "mixed" else mixer(name)
    plan = [mixer(one) for one in MIXED] if made is None else [made, None, made]
    return endless(student_of(plain, plan))


def endless(model: Any) -> Any:
    """No token ends the text."""
    model.generation_config.eos_token_id = None
    return model


def near(model: Any, noise: float = 0.08, seed: int = 3) -> Any:
    """A copy whose weights are a little off, so that some of its draft tokens are accepted."""
    drafted, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafted.parameters():
            scale = noise * parameter.abs().mean()
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return drafted


def plain(model: Any, ids: Tensor, count: int, **settings: Any) -> list[int]:
    """What transformers' own greedy decoding gives after one prompt `[1, T]`."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **settings)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


class Widths:
    """How many tokens each forward pass of a model reads."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[int] = []
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        self.seen.append(kwargs["input_ids"].shape[1])


def chi_square(counts: Sequence[float], probabilities: Sequence[float]) -> float:
    """Pearson's statistic as a standard normal deviate (Wilson and Hilferty); cells expected below 5 are joined."""
    total, cells, rest = sum(counts), [], [0.0, 0.0]
    for count, probability in zip(counts, probabilities, strict=True):
        if probability * total < 5:
            rest = [rest[0] + count, rest[1] + probability * total]
        else:
            cells.append([count, probability * total])
    if rest[1] > 1:
        cells.append(rest)
    elif rest[0] > 20 * max(rest[1], 0.5):
        return float("inf")
    statistic, freedom = sum((seen - due) ** 2 / due for seen, due in cells), len(cells) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


def both_ways(stats: SpeculationStats) -> None:
    """Guesses were accepted and rejected, and the counts agree with each other."""
    assert 0 < stats.accepted < stats.drafted
    assert sum(kept * times for kept, times in stats.lengths.items()) == stats.accepted
    assert stats.tokens_per_second > 0 and str(stats.accepted) in stats.line()
    assert stats.summary()["drafted"] == stats.drafted
