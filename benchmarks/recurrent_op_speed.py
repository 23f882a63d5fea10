"""Recurrent operations against softmax attention (torch SDPA): forward, and forward with backward, same heads, fp32.

`ssd`, `retention`: a decay per head; `gla`: one per key dimension; `delta`: the gated delta rule; `scan`: Mamba's, as
many channels and a state of 16. Gradients of everything that a layer gives them. SDPA's time is that of few heads where
texts are long, times what is missing (`sdpa_heads`), since it takes minutes otherwise. `share_of_peak`: the products
that an operation computes over its time, against the best of a square product in the same run; the scan has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peak import attention_flops, matmul_peak, product_flops
from benchmarks.timing import SEED, parser, publish
from linearize.errors import unknown
from linearize.evaluation.speed.running import Timing, interleaved
from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear import decay_linear
from linearize.ops.recurrent.gated_delta import gated_delta
from linearize.ops.recurrent.selective_scan import selective_scan

SCAN_STATE = 16
LONG, LONGER = 8192, 32768  # from these lengths on SDPA is timed with 2 heads and with 1, and fewer times


@dataclass(frozen=True)
class Operation:
    """The inputs that gradients are asked for, and the output from them."""

    leaves: list[Tensor]
    forward: Callable[[], Tensor]

    def runs(self, name: str) -> dict[str, Callable[[], Any]]:
        """`name`: forward and backward; `name forward`: that alone, without gradients."""
        d_y = torch.randn_like(self.forward().detach())

        def alone() -> Tensor:
            with torch.no_grad():
                return self.forward()

        return {name: lambda: torch.autograd.grad(self.forward(), self.leaves, d_y), f"{name} forward": alone}


def _heads(tokens: int, heads: int, dim: int, count: int) -> list[Tensor]:
    return [torch.randn(1, heads, tokens, dim).requires_grad_() for _ in range(count)]


def _decay(tokens: int, heads: int, dim: int, log_decay: Tensor, learnt: bool = True) -> Operation:
    q, k, v = _heads(tokens, heads, dim, 3)
    log_decay.requires_grad_(learnt)
    leaves = [q, k, v, *([log_decay] if learnt else [])]
    return Operation(leaves, lambda: decay_linear(q, k, v, log_decay, layout=Layout(), need_state=False)[0])


def _ssd(tokens: int, heads: int, dim: int) -> Operation:
    return _decay(tokens, heads, dim, -0.3 * torch.rand(1, heads, tokens))


def _retention(tokens: int, heads: int, dim: int) -> Operation:
    per_head = torch.log1p(-torch.exp2(-5.0 - torch.arange(heads)))
    return _decay(tokens, heads, dim, per_head[None, :, None].repeat(1, 1, tokens), learnt=False)


def _gla(tokens: int, heads: int, dim: int) -> Operation:
    return _decay(tokens, heads, dim, F.logsigmoid(torch.randn(1, heads, tokens, dim)) / 16)


def _delta(tokens: int, heads: int, dim: int) -> Operation:
    q, k, v = _heads(tokens, heads, dim, 3)
    k = F.normalize(k.detach(), dim=-1).requires_grad_()
    g = (-0.3 * torch.rand(1, heads, tokens)).requires_grad_()
    beta = torch.rand(1, heads, tokens).requires_grad_()
    leaves = [q, k, v, g, beta]
    return Operation(leaves, lambda: gated_delta(q, k, v, g, beta, layout=Layout(), need_state=False)[0])


def _scan(tokens: int, heads: int, dim: int) -> Operation:
    x = torch.randn(1, tokens, heads * dim).requires_grad_()
    dt = torch.rand(1, tokens, heads * dim).mul(0.1).requires_grad_()
    A = (-torch.rand(heads * dim, SCAN_STATE) * 16).requires_grad_()
    B, C = (torch.randn(1, tokens, heads, SCAN_STATE).requires_grad_() for _ in range(2))
    leaves = [x, dt, A, B, C]
    return Operation(leaves, lambda: selective_scan(x, dt, A, B, C, layout=Layout(), need_state=False)[0])


OPERATIONS: dict[str, Callable[[int, int, int], Operation]] = {
    "ssd": _ssd,
    "retention": _retention,
    "gla": _gla,
    "delta": _delta,
    "scan": _scan,
}


def _sdpa(tokens: int, heads: int, dim: int) -> Operation:
    q, k, v = _heads(tokens, heads, dim, 3)
    return Operation([q, k, v], lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))


def measure(
    names: Sequence[str], tokens: Sequence[int], heads: int, dim: int, repeats: int, peak: float
) -> list[dict[str, Any]]:
    """One row per operation and length: seconds, times as fast as SDPA, share of `peak` (GFLOP/s).

    Raises:
        InputError: no such operation.
    """
    rows = []
    for name in names:
        if name not in OPERATIONS:
            raise unknown("recurrent operation", name, OPERATIONS)
    for length in tokens:
        torch.manual_seed(SEED)
        ours = {name: OPERATIONS[name](length, heads, dim).runs(name) for name in names}
        timed = heads if length < LONG else min(heads, 2 if length < LONGER else 1)
        sdpa = _sdpa(length, timed, dim)
        runs = {key: run for several in (*ours.values(), sdpa.runs("sdpa")) for key, run in several.items()}
        rounds = 1 if length >= LONGER else min(repeats, 3) if length >= LONG else repeats
        times = interleaved(runs, rounds, warmup=int(length < LONGER))
        attended = {
            key: attention_flops(sdpa.leaves[0], dim, backward=key == "sdpa") for key in ("sdpa", "sdpa forward")
        }
        for name in names:
            row: dict[str, Any] = {"operation": name, "tokens": length, "heads": heads, "dim": dim}
            row["sdpa_heads"] = timed
            pairs = {"both": (name, "sdpa"), "forward": (f"{name} forward", "sdpa forward")}
            for part, (mine, theirs) in pairs.items():
                row[part] = _compared(times[mine], times[theirs], heads / timed, product_flops(runs[mine]), peak)
                row[part]["sdpa_share_of_peak"] = attended[theirs] / times[theirs].seconds / 1e9 / peak
            rows.append(row)
    return rows


def _compared(ours: Timing, sdpa: Timing, missing: float, flops: int, peak: float) -> dict[str, Any]:
    return {
        "seconds": vars(ours),
        "sdpa_seconds": missing * sdpa.seconds,
        "speedup": missing * sdpa.seconds / ours.seconds,
        "speedup_cpu": missing * sdpa.cpu_seconds / ours.cpu_seconds,
        "product_gflops": flops / 1e9,
        "share_of_peak": flops / ours.seconds / 1e9 / peak if flops else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row."""
    lines = [f"{'operation':<11}{'heads':>7}{'tokens':>8}" + f"{'ms':>9}{'x sdpa':>8}{'x cpu':>8}{'peak':>6}" * 2]
    for row in rows:
        line = f"{row['operation']:<11}{row['heads']:>4}x{row['dim']:<2}{row['tokens']:>8}"
        for part in (row["both"], row["forward"]):
            share = "" if part["share_of_peak"] is None else f"{part['share_of_peak']:.0%}"
            line += (
                f"{1e3 * part['seconds']['seconds']:>9.1f}{part['speedup']:>8.2f}{part['speedup_cpu']:>8.2f}{share:>6}"
            )
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print a table (forward with backward, then forward alone) and publish."""
    options = parser(__doc__)
    options.add_argument("--operations", nargs="+", default=list(OPERATIONS), help=f"of {', '.join(OPERATIONS)}")
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--dims", type=int, nargs="+", default=[64, 16], help="widths of a head, one run each")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    peak = matmul_peak()
    rows = []
    for dim in chosen.dims:
        rows += measure(chosen.operations, chosen.tokens, chosen.heads, dim, chosen.repeats, peak)
    print(table(rows))
    setting = {"batch": 1, "dtype": "float32", "threads": chosen.threads, "peak_gflops": peak}
    publish("faster than SDPA from 1024 tokens on, 10 times at 16384, 35 times at 65536", setting, rows, chosen.out)


if __name__ == "__main__":
    main()
