"""Standard errors and intervals against bootstraps, exact coverage and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linearize.metrics.intervals import (
    Z95,
    Proportion,
    bootstrap_over_documents,
    contrast_over_documents,
    mean_over_documents,
    paired_difference,
    plus_minus,
    ratio_over_documents,
    share_text,
    wilson,
)


def tokens_of_documents(documents: int = 61, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Losses of tokens that go together within a document, documents of unequal length in no order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 60, (documents,), generator=generator)
    document_N = torch.arange(documents).repeat_interleave(lengths)
    level_D = torch.randn(documents, generator=generator)
    value_N = 2 + level_D[document_N] + 0.7 * torch.randn(len(document_N), generator=generator)
    order = torch.randperm(len(document_N), generator=generator)
    return value_N[order], document_N[order] * 5 + 2


def test_means_and_ratios_agree_with_a_bootstrap_over_documents() -> None:
    value_N, document_N = tokens_of_documents()
    weight_N = 1 + (value_N * 3).abs().round()
    for weights in (None, weight_N):
        mean = (
            mean_over_documents(value_N, document_N)
            if weights is None
            else ratio_over_documents(value_N, weights, document_N)
        )
        assert mean.interval is not None
        low, high = bootstrap_over_documents(value_N, document_N, weight_N=weights, repeats=4000)
        width = high - low
        assert mean.interval[0] == pytest.approx(low, abs=0.1 * width)
        assert mean.interval[1] == pytest.approx(high, abs=0.1 * width)
        assert mean.interval[1] - mean.interval[0] == pytest.approx(width, rel=0.08)
    over_tokens = value_N.std().item() / len(value_N) ** 0.5
    assert mean_over_documents(value_N, document_N).error > 2 * over_tokens  # tokens are no independent draws


def test_a_contrast_agrees_with_a_bootstrap_of_its_parts() -> None:
    value_N, document_N = tokens_of_documents(documents=83, seed=5)
    late_N = torch.rand(len(value_N), generator=torch.Generator().manual_seed(1)) < 0.3
    value_N = value_N + late_N * (1 + 0.3 * document_N % 3)
    actual = contrast_over_documents(value_N, document_N, [(1.0, late_N), (-2.0, ~late_N)])
    expected = value_N[late_N].double().mean() - 2 * value_N[~late_N].double().mean()
    assert actual.value == pytest.approx(expected.item(), abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    names = document_N.unique()
    drawn = []
    rows = {int(d): (document_N == d).nonzero()[:, 0] for d in names}
    for _ in range(1500):
        pick = names[torch.randint(len(names), (len(names),), generator=generator)]
        index = torch.cat([rows[int(d)] for d in pick])
        v, late = value_N[index].double(), late_N[index]
        drawn.append((v[late].mean() - 2 * v[~late].mean()).item())
    assert actual.error == pytest.approx(torch.tensor(drawn).std().item(), rel=0.12)


def test_one_document_has_no_error() -> None:
    value_N, one_N = torch.arange(5.0), torch.zeros(5)
    assert ratio_over_documents(value_N, value_N + 1, one_N).error is None
    assert ratio_over_documents(value_N, value_N + 1, one_N).value == pytest.approx(10 / 15)
    assert mean_over_documents(value_N, one_N).interval is None
    assert contrast_over_documents(value_N, one_N, [(1.0, value_N > 2)]).error is None


def test_wilson_by_hand_and_by_coverage() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(7, 23)
    for bound in (low, high):  # the interval's ends solve |p - share| = z sqrt(p (1 - p) / n)
        assert abs(7 / 23 - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / 23), abs=1e-9)
    assert wilson(0, 19)[0] == 0 and 0.1 < wilson(0, 19)[1] < 0.2
    assert wilson(19, 19)[1] == 1 and wilson(19, 19)[0] == pytest.approx(1 - wilson(0, 19)[1])
    for n, p in ((17, 0.1), (41, 0.5), (97, 0.93)):
        inside = sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1]
        )
        assert 0.92 < inside <= 0.99


def test_proportion() -> None:
    share = Proportion.of([True, 0, 1, False, 1])
    assert (share.successes, share.n, share.value) == (3, 5, 0.6)
    assert share.to_dict() == {"value": 0.6, "low": wilson(3, 5)[0], "high": wilson(3, 5)[1], "successes": 3, "n": 5}
    assert Proportion(0, 0).value == 0


@pytest.mark.parametrize("n", [29, 151])
def test_paired_differences_cover_the_truth(n: int) -> None:
    """Two models that agree on most items: the interval holds the true difference about 95 times in 100."""
    generator = torch.Generator().manual_seed(n)
    truth, covered, rounds = 0.06, 0, 600  # first right alone 10%, second right alone 4%
    for _ in range(rounds):
        draw = torch.rand(n, generator=generator)
        first = ((draw < 0.1) | (draw > 0.4)).int().tolist()
        second = (((draw >= 0.1) & (draw < 0.14)) | (draw > 0.4)).int().tolist()
        actual = paired_difference(first, second)
        assert actual.value == pytest.approx(sum(a - b for a, b in zip(first, second, strict=True)) / n)
        covered += actual.low <= truth <= actual.high
    assert 0.92 < covered / rounds <= 0.99


def test_paired_differences_of_few_items_are_no_certainty() -> None:
    same = paired_difference([1, 0, 1], [1, 0, 1])
    assert same.value == 0 and same.low < -0.3 and same.high > 0.3 and not same.beyond_noise
    lost = paired_difference([1] * 40, [0] * 37 + [1] * 3)
    assert lost.value == pytest.approx(37 / 40) and lost.beyond_noise and lost.low < lost.value <= lost.high
    swings = paired_difference([1, -1] * 30, [-1, 1] * 30)  # differences of two: wider than those of one
    assert swings.high > 1.8 * paired_difference([1, 0] * 30, [0, 1] * 30).high
    nothing = paired_difference([], [])
    assert (nothing.low, nothing.high) == (-1, 1) and not nothing.beyond_noise


def test_numbers_as_text() -> None:
    assert plus_minus(0.12345, 0.0042) == "0.123 ± 0.004"
    assert plus_minus(0.12345, 0.0142) == "0.123 ± 0.014"
    assert plus_minus(1.70312, 0.0412, digits=2) == "1.703 ± 0.041"
    assert plus_minus(231.7, 26.0) == "232 ± 26"
    assert plus_minus(1.5, None) == "1.5" and plus_minus(1.5, 0.0) == "1.5 ± 0"
    assert plus_minus(2.0, 1e-9) == "2.000000 ± 0.000000"
    assert share_text(0.52, 0.481, 0.559) == "52.0% (48.1 to 55.9)"
