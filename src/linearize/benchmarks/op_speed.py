"""Forward and backward of window + linear attention against softmax attention (torch SDPA), same heads and dtype.

Ours includes both feature maps and gives gradients of q, k, v and of all new parameters; SDPA gives those of q, k, v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.benchmarks.timing import SEED, parser, publish
from linearize.evaluation.speed.timing import interleaved
from linearize.mixers import MIXERS, AttentionShape
from linearize.ops.layout import Layout

WINDOW = {"window": 64, "window_shape": "terraced"}
OURS: dict[str, dict[str, Any]] = {
    "lolcats": {**WINDOW, "feature_map": "hedgehog", "feature_dim": 64},
    "window-linear": {**WINDOW, "feature_map": "gain", "feature_dim": 32, "shift": "shared", "num_sinks": 1},
}


def measure(
    tokens: Sequence[int], *, heads: int, kv_heads: int, dim: int, repeats: int, bf16_up_to: int
) -> list[dict[str, Any]]:
    """One row per length: seconds of each form, and how many times as fast ours is as the faster SDPA."""
    rows = []
    shape = AttentionShape(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, value_dim=dim, model_dim=heads * dim)
    for length in tokens:
        runs = {name: _mixer_run(config, shape, length) for name, config in OURS.items()}
        sdpa = {"sdpa_fp32": _sdpa_run(shape, length, torch.float32)}
        if length <= bf16_up_to:
            sdpa["sdpa_bf16"] = _sdpa_run(shape, length, torch.bfloat16)
        times = interleaved({**runs, **sdpa}, repeats)
        best = min((times[name] for name in sdpa), key=lambda timing: timing.seconds)
        rows.append(
            {
                "tokens": length,
                "kv_heads": kv_heads,
                "times": {name: vars(timing) for name, timing in times.items()},
                "speedup": {name: best.seconds / times[name].seconds for name in runs},
                "speedup_cpu": {name: best.cpu_seconds / times[name].cpu_seconds for name in runs},
            }
        )
    return rows


def _tensors(shape: AttentionShape, tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(SEED)
    sizes = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    leaves = [torch.randn(1, n, tokens, shape.head_dim).to(dtype).requires_grad_(True) for n in sizes]
    return leaves, torch.randn(1, shape.num_heads, tokens, shape.value_dim).to(dtype)


def _mixer_run(config: dict[str, Any], shape: AttentionShape, tokens: int) -> Callable[[], Any]:
    mixer = MIXERS["lolcats"](**config).build(shape)
    (q, k, v), d_y = _tensors(shape, tokens, torch.float32)
    wanted = [q, k, v, *mixer.parameters()]

    def run() -> Any:
        y, _ = mixer(q, k, v, scaling=shape.head_dim**-0.5, layout=Layout(), need_state=False)
        return torch.autograd.grad(y, wanted, d_y)

    return run


def _sdpa_run(shape: AttentionShape, tokens: int, dtype: torch.dtype) -> Callable[[], Any]:
    (q, k, v), d_y = _tensors(shape, tokens, dtype)
    gqa = shape.group > 1

    def run() -> Any:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return torch.autograd.grad(y, [q, k, v], d_y)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384])
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2])
    options.add_argument("--dim", type=int, default=64)
    options.add_argument("--bf16-up-to", type=int, default=2048, help="longest text for which bf16 SDPA is timed too")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    rows = []
    for kv_heads in chosen.kv_heads:
        rows += measure(
            chosen.tokens,
            heads=chosen.heads,
            kv_heads=kv_heads,
            dim=chosen.dim,
            repeats=chosen.repeats,
            bf16_up_to=chosen.bf16_up_to,
        )
    setting = {"batch": 1, "heads": chosen.heads, "head_dim": chosen.dim, "dtype": "float32", "mixers": OURS}
    publish("speedup at least 1 at 2048 tokens and 4 at 16384", setting, rows, chosen.out)


if __name__ == "__main__":
    main()
