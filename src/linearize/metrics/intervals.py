"""How sure a measured number is: standard errors over documents, intervals of shares and of paired differences.

One place for the statistics of an evaluation. Intervals are 95%, two-sided. Tokens of one document depend on each
other, so documents, not tokens, are the independent draws; items of a task are independent, and two models on the same
items are compared item by item (paired).

Letters: N tokens or items, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.959963984540054
"""Half the width of a normal 95% interval in standard errors."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over tokens; `error` is its standard error with documents, not tokens, as the independent draws."""

    value: float
    error: float | None
    tokens: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval; None where the error is unknown."""
        return None if self.error is None else interval(self.value, self.error)

    def to_dict(self) -> dict[str, float | None]:
        """JSON-able: value and standard error."""
        return {"value": self.value, "error": self.error}


def interval(value: float, error: float) -> tuple[float, float]:
    """The normal 95% interval of a value with this standard error."""
    return value - Z95 * error, value + Z95 * error


def mean_over_documents(value_N: Tensor, document_N: Tensor) -> Mean:
    """Mean over N > 0 tokens; the error is that of a ratio estimate over documents, None for fewer than two of them."""
    return ratio_over_documents(value_N, torch.ones_like(value_N, dtype=torch.float64), document_N)


def ratio_over_documents(amount_N: Tensor, weight_N: Tensor, document_N: Tensor) -> Mean:
    """The sum of the amounts by the sum of the weights (bits by bytes, say), and its error over documents.

    The error is that of a ratio estimate (linearised: Cochran, Sampling Techniques, section 6.4), None for fewer than
    two documents. `tokens` is N. The weights must not sum to zero.
    """
    amount_N, weight_N = amount_N.double(), weight_N.double()
    total = weight_N.sum()
    ratio = amount_N.sum() / total
    _, index_N = document_N.unique(return_inverse=True)
    documents, tokens = int(index_N.max()) + 1, amount_N.numel()
    if documents < 2:
        return Mean(value=ratio.item(), error=None, tokens=tokens)
    residual_D = torch.zeros(documents, dtype=torch.float64).index_add_(0, index_N, amount_N - ratio * weight_N)
    error = (documents / (documents - 1) * residual_D.square().sum()).sqrt() / total
    return Mean(value=ratio.item(), error=error.item(), tokens=tokens)


def contrast_over_documents(value_N: Tensor, document_N: Tensor, parts: Sequence[tuple[float, Tensor]]) -> Mean:
    """A weighted sum of the means over some tokens each: `[(1, late), (-1, early)]` is how much later tokens differ.

    `parts` are (weight, mask [N] with at least one token); they may share documents, which the error takes into account
    (linearised, None for fewer than two documents). `tokens` is that of all masks together.
    """
    value_N = value_N.double()
    _, index_N = document_N.unique(return_inverse=True)
    documents = int(index_N.max()) + 1
    residual_D = torch.zeros(documents, dtype=torch.float64)
    total, any_N = 0.0, torch.zeros_like(index_N, dtype=torch.bool)
    for weight, mask_N in parts:
        mean = value_N[mask_N].mean()
        total += weight * mean.item()
        residual_D.index_add_(0, index_N[mask_N], weight * (value_N[mask_N] - mean) / mask_N.sum())
        any_N |= mask_N
    error = (documents / (documents - 1) * residual_D.square().sum()).sqrt().item() if documents > 1 else None
    return Mean(value=total, error=error, tokens=int(any_N.sum()))


def bootstrap_over_documents(
    amount_N: Tensor, document_N: Tensor, *, weight_N: Tensor | None = None, repeats: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of the mean (or ratio) when whole documents are drawn anew, with replacement.

    Slower than the closed forms above and free of their approximations: they are checked against it.
    """
    weight_N = torch.ones_like(amount_N) if weight_N is None else weight_N
    _, index_N = document_N.unique(return_inverse=True)
    documents = int(index_N.max()) + 1
    sums_2D = torch.zeros(2, documents, dtype=torch.float64)
    sums_2D.index_add_(1, index_N, torch.stack([amount_N.double(), weight_N.double()]))
    drawn_RD = torch.randint(documents, (repeats, documents), generator=torch.Generator().manual_seed(seed))
    amount_R, weight_R = sums_2D[:, drawn_RD].sum(-1)
    low, high = (amount_R / weight_R).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927): sensible at 0, at 1 and for few items; (0, 1) for none."""
    assert 0 <= successes <= n
    if not n:
        return 0.0, 1.0
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


@dataclass(frozen=True)
class Proportion:
    """A share of independent items: how many of `n`."""

    successes: int
    n: int

    @classmethod
    def of(cls, hits: Iterable[bool | int]) -> Proportion:
        """Count the hits."""
        outcomes = [bool(hit) for hit in hits]
        return cls(sum(outcomes), len(outcomes))

    @property
    def value(self) -> float:
        """The share; 0 where there are no items."""
        return self.successes / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95% interval."""
        return wilson(self.successes, self.n)

    def to_dict(self) -> dict[str, float | int]:
        """JSON-able: value, low, high, successes, n."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "successes": self.successes, "n": self.n}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of paired differences over `n` items, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float | int]:
        """JSON-able: value, low, high, n."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The mean of first - second over the same items, whose scores are 0 or 1 (or small whole numbers).

    The interval adds one difference of +1 and one of -1 before it takes the normal one (Bonett and Price 2012, for
    paired shares), so that few items that happen to agree are not taken for certainty; it always holds the mean.
    """
    difference = [a - b for a, b in zip(first, second, strict=True)]
    n = len(difference)
    if not n:
        return Difference(value=0.0, low=-1.0, high=1.0, n=0)
    value = math.fsum(difference) / n
    centre = math.fsum(difference) / (n + 2)
    variance = (math.fsum(x * x for x in difference) + 2) / (n + 2) - centre * centre
    half = Z95 * math.sqrt(variance / (n + 2))
    return Difference(value=value, low=min(centre - half, value), high=max(centre + half, value), n=n)


def plus_minus(value: float, error: float | None, *, digits: int = 1) -> str:
    """`0.123 ± 0.004`: the error with so many digits (one more where it begins with 1), the value as far."""
    if error is None or not math.isfinite(error) or not math.isfinite(value):
        return f"{value:.4g}"
    if error <= 0:
        return f"{value:.4g} ± 0"
    exponent = math.floor(math.log10(error))
    decimals = min(max(digits - 1 - exponent + (error / 10**exponent < 1.95), 0), 6)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def share_text(value: float, low: float, high: float) -> str:
    """`52.0% (48.1 to 55.9)`: a share, or a difference of shares, with its interval."""
    return f"{value * 100:.1f}% ({low * 100:.1f} to {high * 100:.1f})"
