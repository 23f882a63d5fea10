"""Window + linear attention against softmax attention (torch SDPA), same heads and dtype, and its share of the peak.

Forward and backward together, and forward alone. Ours includes both feature maps and gives gradients of q, k, v and of
all new parameters; SDPA gives those of q, k, v. Beyond `LONG` tokens SDPA is timed once, without a round to warm up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peak import matmul_peak
from benchmarks.timing import SEED, parser, publish
from linearize.evaluation.speed.running import Timing, interleaved
from linearize.mixers import MIXERS, AttentionShape
from linearize.ops.layout import Layout
from linearize.ops.window_linear.spec import in_window

LONG = 8192
OURS: dict[str, dict[str, Any]] = {
    "lolcats": {"window_shape": "terraced", "feature_map": "hedgehog", "feature_dim": 64},
    "window-linear": {
        "window_shape": "terraced", "feature_map": "gain", "feature_dim": 32, "shift": "shared", "num_sinks": 1
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one row measures."""

    shape: AttentionShape
    tokens: int
    window: int
    backward: bool
    repeats: int
    with_bf16: bool

    def mixers(self) -> dict[str, dict[str, Any]]:
        """The configs of ours."""
        return {name: {**config, "window": self.window} for name, config in OURS.items()}


def useful_flops(config: Mapping[str, Any], shape: AttentionShape, tokens: int, *, backward: bool) -> int:
    """FLOPs of the products that the operation needs: what queries see by softmax, the maps, what enters the sum and is
    read from it; two products backward for each forward.

    Not counted: hidden parts of tiles, what is computed a second time, normalisers, gains, exponentials.
    """
    window, sinks = config["window"], config.get("num_sinks", 0)
    position = torch.arange(tokens)
    reach = min(tokens, 2 * window)
    key = position[:, None] - torch.arange(reach)
    near = in_window(position[:, None], key, window, config["window_shape"]) & (key >= sinks)
    pairs = int(near.sum()) + sum(max(0, tokens - sink) for sink in range(sinks))
    columns = config["feature_dim"]
    maps = 2 * 2 * shape.head_dim * columns
    sums = 2 * 2 * (2 * columns) * shape.value_dim
    forward = 2 * pairs * (shape.head_dim + shape.value_dim) + tokens * (maps + sums)
    return shape.num_heads * forward * (3 if backward else 1)


def measure(case: Case, peak: float) -> dict[str, Any]:
    """One row: seconds of each backend, our speed-up over the faster SDPA, and the share of the peak."""
    ours = {name: _mixer_run(config, case) for name, config in case.mixers().items()}
    sdpa = {"sdpa_fp32": _sdpa_run(case, torch.float32)}
    if case.with_bf16:
        sdpa["sdpa_bf16"] = _sdpa_run(case, torch.bfloat16)
    times, rounds = _timed(ours, sdpa, case)
    best = min((times[name] for name in sdpa), key=lambda timing: timing.seconds)
    flops = {
        name: useful_flops(c, case.shape, case.tokens, backward=case.backward) for name, c in case.mixers().items()
    }
    rates = {name: flops[name] / times[name].seconds / 1e9 for name in ours}
    return {
        "tokens": case.tokens,
        "pass": "forward and backward" if case.backward else "forward",
        "heads": case.shape.num_heads,
        "kv_heads": case.shape.num_kv_heads,
        "window": case.window,
        "rounds": {"ours": case.repeats, "sdpa": rounds},
        "times": {name: vars(timing) for name, timing in times.items()},
        "speedup": {name: best.seconds / times[name].seconds for name in ours},
        "speedup_cpu": {name: best.cpu_seconds / times[name].cpu_seconds for name in ours},
        "useful_gflop_per_second": rates,
        "share_of_peak": {name: rate / peak for name, rate in rates.items()},
        "share_of_peak_cpu": {name: flops[name] / times[name].cpu_seconds / 1e9 / peak for name in ours},
    }


def _timed(
    ours: Mapping[str, Callable[[], Any]], sdpa: Mapping[str, Callable[[], Any]], case: Case
) -> tuple[dict[str, Timing], int]:
    """Times of all, and how often SDPA ran."""
    if case.tokens <= LONG:
        return interleaved({**ours, **sdpa}, case.repeats), case.repeats
    return {**interleaved(ours, case.repeats), **interleaved(sdpa, 1, warmup=0)}, 1


def _tensors(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(SEED)
    shape = case.shape
    sizes = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    leaves = [torch.randn(1, n, case.tokens, shape.head_dim).to(dtype).requires_grad_(case.backward) for n in sizes]
    return leaves, torch.randn(1, shape.num_heads, case.tokens, shape.value_dim).to(dtype)


def _mixer_run(config: dict[str, Any], case: Case) -> Callable[[], Any]:
    mixer = MIXERS["lolcats"](**config).build(case.shape).requires_grad_(case.backward)
    (q, k, v), d_y = _tensors(case, torch.float32)
    leaves = [q, k, v, *mixer.parameters()]

    def run() -> Any:
        y, _ = mixer(q, k, v, scaling=case.shape.head_dim**-0.5, layout=Layout(), need_state=False)
        return torch.autograd.grad(y, leaves, d_y) if case.backward else y

    return run


def _sdpa_run(case: Case, dtype: torch.dtype) -> Callable[[], Any]:
    (q, k, v), d_y = _tensors(case, dtype)
    gqa = case.shape.group > 1

    def run() -> Any:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return torch.autograd.grad(y, [q, k, v], d_y) if case.backward else y

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--kv-heads", type=int, default=8)
    options.add_argument("--long-heads", type=int, default=2, help="heads of both, beyond 16384 tokens")
    options.add_argument("--dim", type=int, default=64)
    options.add_argument("--windows", type=int, nargs="+", default=[64, 16, 128], help="the first at every length")
    options.add_argument("--windows-at", type=int, default=4096, help="length for the other windows")
    options.add_argument("--bf16-up-to", type=int, default=1024, help="longest text for which bf16 SDPA is timed too")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)
    peak = matmul_peak()
    first, *others = chosen.windows
    rows = []
    for tokens, window in [*((n, first) for n in chosen.tokens), *((chosen.windows_at, w) for w in others)]:
        heads = min(chosen.heads, chosen.long_heads) if tokens > 16384 else chosen.heads
        shape = AttentionShape(
            num_heads=heads,
            num_kv_heads=min(chosen.kv_heads, heads),
            head_dim=chosen.dim,
            value_dim=chosen.dim,
            model_dim=heads * chosen.dim,
        )
        for backward in (True, False):
            case = Case(
                shape=shape, tokens=tokens, window=window, backward=backward, repeats=chosen.repeats,
                with_bf16=tokens <= chosen.bf16_up_to,
            )  # fmt: skip
            rows.append(measure(case, peak))
    setting = {"batch": 1, "head_dim": chosen.dim, "dtype": "float32", "mixers": OURS, "peak_gflop_per_second": peak}
    asked = "forward and backward: speedup at least 1 at 1024 tokens, 10 at 16384, 35 at 65536"
    publish(asked, setting, rows, chosen.out)


if __name__ == "__main__":
    main()
