"""Evaluation: losses, agreement, ablation, recall, decode cost, report, plots and card, against plain computations."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.errors import InputError
from linearize.metrics.intervals import mean_over_documents
from linearize.metrics.language_model import (
    branch_ablation,
    held_out_report,
    loss_only,
    powers_of_two,
)
from linearize.metrics.token_scores import View, score_batches

VOCABULARY = 67
LENGTH = 23


def tiny_llama(seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A random Llama with random norms and logits far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, head_dim=10, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.eval()


class Branched(nn.Module):
    """Three random models behind the keyword `branch`, as a student has it."""

    def __init__(self, *seeds: int) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {name: tiny_llama(seed) for name, seed in zip(("both", "window", "linear"), seeds, strict=True)}
        )
        self.config = self.branches["both"].config

    def forward(
        self, *, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False, branch: str = "both"
    ) -> SimpleNamespace:
        return self.branches[branch](input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


def packed_batches(lengths: list[list[int]], seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of documents of the given lengths; the first label of a document is ignored, and some more at random."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), LENGTH), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    labels = ids.masked_fill(positions == 0, -100)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.2, -100)
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return [{k: v[:3] for k, v in batch.items()}, {k: v[3:] for k, v in batch.items()}]


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    return packed_batches([[9, 14], [23], [5, 7, 11], [1, 20, 2], [13, 10]])


def by_document(
    model: nn.Module, batches: list[dict[str, Tensor]], **extra: Any
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The plain way: every document alone in the model. (logits [n, V], targets [n], positions [n]) of each."""
    results = []
    for batch in batches:
        for ids, positions, labels in zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True):
            starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
            for a, b in pairwise(starts):
                inputs = {"input_ids": ids[None, a:b], "position_ids": torch.arange(b - a)[None]}
                with torch.no_grad():
                    logits = model(**inputs, **extra).logits[0, :-1].double()
                keep = labels[a + 1 : b] != -100
                results.append((logits[keep], labels[a + 1 : b][keep], torch.arange(b - a - 1)[keep]))
    return results


def test_packed_teacher_equals_documents_alone(batches: list[dict[str, Tensor]]) -> None:
    """transformers keeps documents apart by itself when there is no mask and no cache."""
    for attention in ("sdpa", "eager"):
        teacher = tiny_llama(1)
        teacher.config._attn_implementation = attention
        alone = by_document(teacher, batches)
        expected = F.cross_entropy(torch.cat([x for x, _, _ in alone]), torch.cat([y for _, y, _ in alone])).item()
        loss, count = loss_only(teacher, batches)
        assert loss == pytest.approx(expected, abs=1e-5)
        assert count == sum(len(y) for _, y, _ in alone)
        flat = {**batches[0], "position_ids": torch.arange(LENGTH).expand(3, -1)}
        assert abs(loss_only(teacher, [flat])[0] - loss_only(teacher, batches[:1])[0]) > 1e-3


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_report_against_full_logits(batches: list[dict[str, Tensor]], rows: int | None) -> None:
    teacher, student = tiny_llama(1), tiny_llama(2)
    report = held_out_report(student, teacher, batches, rows=rows)
    t, s = by_document(teacher, batches), by_document(student, batches)
    t_NV, s_NV, y_N = torch.cat([x for x, _, _ in t]), torch.cat([x for x, _, _ in s]), torch.cat([y for _, y, _ in t])
    assert report.tokens == len(y_N)
    assert report.documents == sum(len(y) > 0 for _, y, _ in t)
    assert report.teacher_loss == pytest.approx(F.cross_entropy(t_NV, y_N).item(), abs=1e-5)
    assert report.student_loss == pytest.approx(F.cross_entropy(s_NV, y_N).item(), abs=1e-5)
    kl = F.kl_div(s_NV.log_softmax(-1), t_NV.log_softmax(-1), log_target=True, reduction="batchmean").item()
    assert report.student_kl == pytest.approx(kl, abs=1e-5)
    assert report.student_top1 == pytest.approx((t_NV.argmax(-1) == s_NV.argmax(-1)).double().mean().item())
    assert report.teacher_perplexity == pytest.approx(math.exp(report.teacher_loss))
    assert report.gap == pytest.approx(report.student_loss - report.teacher_loss, abs=1e-6)
    json.dumps(report.to_dict(), allow_nan=False)


def test_loss_by_position(batches: list[dict[str, Tensor]]) -> None:
    teacher, student = tiny_llama(1), tiny_llama(2)
    report = held_out_report(student, teacher, batches, position_bins=[0, 3, 8, 40])
    by_hand = by_document(student, batches)
    losses = torch.cat([F.cross_entropy(x, y, reduction="none") for x, y, _ in by_hand])
    positions = torch.cat([p for _, _, p in by_hand])
    for b in report.by_position:
        inside = (positions >= b.start) & (positions < b.end)
        assert b.tokens == inside.sum()
        assert b.student_loss == pytest.approx(losses[inside].mean().item(), abs=1e-5)
    assert sum(b.tokens for b in report.by_position) == report.tokens
    assert powers_of_two(15) == [0, 1, 2, 4, 8, 16]
    assert powers_of_two(16) == [0, 1, 2, 4, 8, 16, 32]
    with pytest.raises(InputError, match="rising order"):
        held_out_report(None, teacher, batches, position_bins=[4, 2])


def test_standard_error_is_over_documents() -> None:
    """Documents of equal length: the error is that of their means; repeating tokens does not shrink it."""
    torch.manual_seed(0)
    means = torch.randn(11)
    for repeats in (1, 7):
        got = mean_over_documents(means.repeat_interleave(repeats), torch.arange(11).repeat_interleave(repeats))
        assert got.value == pytest.approx(means.double().mean().item(), abs=1e-6)
        assert got.error == pytest.approx((means.double().std() / math.sqrt(11)).item(), abs=1e-6)
    assert mean_over_documents(torch.randn(5), torch.zeros(5)).error is None


def test_alone_and_modes(batches: list[dict[str, Tensor]]) -> None:
    teacher, student = tiny_llama(1), tiny_llama(2).train()
    alone = held_out_report(None, teacher, batches)
    assert alone.student_loss is None and alone.student_kl is None
    both = held_out_report(student, teacher, iter(batches))
    assert both.teacher_loss == pytest.approx(alone.teacher_loss, abs=1e-7)
    assert held_out_report(student, None, batches).student_loss == pytest.approx(both.student_loss, abs=1e-7)
    assert student.training and not teacher.training
    same = held_out_report(teacher, teacher, batches)
    assert same.student_kl == pytest.approx(0, abs=1e-7) and same.student_top1 == 1 and same.gap == 0


def test_branch_ablation(batches: list[dict[str, Tensor]]) -> None:
    student, teacher = Branched(2, 3, 4), tiny_llama(1)
    window = 6
    ablation = branch_ablation(student, batches, window=window, teacher=teacher)
    for name in ("both", "window", "linear"):
        parts = by_document(student, batches, branch=name)
        loss = torch.cat([F.cross_entropy(x, y, reduction="none") for x, y, _ in parts])
        beyond = torch.cat([p for _, _, p in parts]) >= window
        assert getattr(ablation.all_tokens, name) == pytest.approx(loss.mean().item(), abs=1e-5)
        assert getattr(ablation.beyond_window, name) == pytest.approx(loss[beyond].mean().item(), abs=1e-5)
        assert ablation.beyond_window.tokens == beyond.sum() < ablation.all_tokens.tokens
        assert loss_only(student, batches, name)[0] == pytest.approx(loss.mean().item(), abs=1e-5)
    a = ablation.all_tokens
    share = (a.window - a.both) / (a.window - a.teacher)
    assert a.share == (pytest.approx(share) if a.window > a.teacher else None)
    assert branch_ablation(student, batches).beyond_window is None


def test_share_of_the_gap() -> None:
    """Both branches as good as the teacher: all of it; where the window alone is as good, there is nothing to share."""
    batches = packed_batches([[23], [23], [23], [23], [23]])
    losses = {seed: loss_only(tiny_llama(seed), batches)[0] for seed in (1, 2)}
    better, worse = sorted(losses, key=losses.__getitem__)
    teacher = tiny_llama(better)
    assert branch_ablation(Branched(better, worse, 3), batches, teacher=teacher).all_tokens.share == pytest.approx(1)
    assert branch_ablation(Branched(worse, worse, 3), batches, teacher=teacher).all_tokens.share == 0
    assert branch_ablation(Branched(worse, better, 3), batches, teacher=teacher).all_tokens.share is None
    assert branch_ablation(Branched(better, worse, 3), batches).all_tokens.share is None


def test_nothing_to_measure_and_other_vocabulary(batches: list[dict[str, Tensor]]) -> None:
    empty = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    with pytest.raises(InputError, match="nothing to measure"):
        loss_only(tiny_llama(1), [empty])
    with pytest.raises(InputError, match=r"teacher 67, student 71"):
        held_out_report(tiny_llama(2, vocabulary=71), tiny_llama(1), batches)
    mixed = held_out_report(None, tiny_llama(1), [empty, *batches])  # a batch without labels changes nothing
    assert mixed.teacher_loss == held_out_report(None, tiny_llama(1), batches).teacher_loss


def test_logits_of_few_rows_at_a_time(batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of one forward pass shrink with the room for logits."""
    model, seen = tiny_llama(1), []
    model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    score_batches(batches, {"model": View(model=model)})
    monkeypatch.setattr("linearize.metrics.token_scores.LOGITS_BYTES", 2 * LENGTH * VOCABULARY * 4)
    score_batches(batches, {"model": View(model=model)})
    assert seen == [3, 2, 2, 1, 2]
