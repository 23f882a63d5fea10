"""The fused window + linear attention on a GPU against FlashAttention-2: forward, and forward with backward.

Same heads and dtype. Ours computes both feature maps and gives gradients of q, k, v, maps and factor; attention gives
those of q, k, v. Flash: torch's, and the flash-attn package's where installed; the faster one counts. Shares of the
peaks that a large product and a large copy reach in the same run say how near to the machine's limit ours is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.on_gpu import Clock, Peaks, arguments, device_for, facts, fastest, peaks, ratio, shares, timings_json
from benchmarks.timing import SEED, parser, publish_each
from linearize.evaluation.speed.running import Timing
from linearize.mixers import MIXERS, AttentionShape
from linearize.ops.layout import Layout
from linearize.ops.window_linear import use_backend

ASKED = {1024: 1.0, 32768: 8.0}  # times FlashAttention-2, forward
SMALL = {"tokens": [70], "head_dim": [16], "heads": 2, "kv_heads": 1, "window": 16, "repeats": 1}
BACKWARD = 2.5  # times the work of the forward pass: every product twice, scores once more


def mixer_of(shape: AttentionShape, window: int, device: torch.device) -> Any:
    """LoLCATs as published, with its parameters in fp32."""
    torch.manual_seed(SEED)
    config: dict[str, Any] = {"window": window, "feature_dim": min(64, shape.head_dim)}
    return MIXERS["lolcats"](**config).build(shape).to(device)


def work(mixer: Any, tokens: int, batch: int, element_size: int) -> tuple[float, float]:
    """Floating-point operations and bytes of a forward pass: those of decoding each token with the average window, and
    what must be read and written at least."""
    shape, config = mixer.shape, mixer.config
    width, features = shape.head_dim + shape.value_dim, mixer.feature_q.num_features
    per_head = 2 * 1.5 * config.window * width  # a terraced window holds between one and two blocks
    per_head += 4 * features * (shape.value_dim + 1) + 4 * shape.head_dim * config.feature_dim
    numbers = (shape.num_heads + shape.num_kv_heads) * width
    return batch * tokens * shape.num_heads * per_head, batch * tokens * numbers * element_size


def inputs(
    shape: AttentionShape, batch: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """q, k, v that require gradients, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(SEED)

    def some(heads: int, dim: int) -> Tensor:
        return torch.randn(batch, heads, tokens, dim, device=device, generator=generator).to(dtype)

    sizes = ((shape.num_heads, shape.head_dim), (shape.num_kv_heads, shape.head_dim))
    qkv = [some(*size).requires_grad_() for size in (*sizes, (shape.num_kv_heads, shape.value_dim))]
    return qkv, some(shape.num_heads, shape.value_dim)


def ours(mixer: Any, qkv: Sequence[Tensor]) -> Tensor:
    """The kernels over chunks, whatever the dispatcher would choose."""
    with use_backend("triton_chunks"):
        y: Tensor = mixer(*qkv, scaling=mixer.shape.head_dim**-0.5, layout=Layout(), need_state=False)[0]
    return y


def torch_flash(qkv: Sequence[Tensor]) -> Tensor:
    """FlashAttention-2 as torch has it; on a CPU torch's default."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = qkv
    backends = [SDPBackend.FLASH_ATTENTION] if q.device.type == "cuda" else [SDPBackend.MATH]
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def package_flash(qkv: Sequence[Tensor]) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    y: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in qkv), causal=True)
    return y.transpose(1, 2)


def trained(forward: Callable[[], Tensor], d_y: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(forward(), leaves, d_y, allow_unused=True)


def measure(clock: Clock, peak: Peaks, shape: AttentionShape, tokens: int, chosen: Any, dtype: torch.dtype) -> Any:
    """One row: milliseconds, our speed-up over the faster flash, shares of the peaks."""
    mixer = mixer_of(shape, chosen.window, clock.device)
    qkv, d_y = inputs(shape, chosen.batch, tokens, clock.device, dtype)
    forwards: dict[str, Callable[[], Tensor]] = {"ours": partial(ours, mixer, qkv), "flash": partial(torch_flash, qkv)}
    if clock.device.type == "cuda" and find_spec("flash_attn") is not None:
        forwards["flash_attn"] = partial(package_flash, qkv)
    leaves = {name: [*qkv, *(mixer.parameters() if name == "ours" else ())] for name in forwards}
    row: dict[str, Any] = {"tokens": tokens, "head_dim": shape.head_dim}
    for kind in ("forward", "forward_backward"):
        runs = {
            name: torch.no_grad()(run) if kind == "forward" else partial(trained, run, d_y, leaves[name])
            for name, run in forwards.items()
        }
        times = clock.interleaved(runs, chosen.repeats, warmup=0 if chosen.interpret else 3)
        best = fastest(times, [name for name in times if name != "ours"])
        flops, moved = work(mixer, tokens, chosen.batch, dtype.itemsize)
        row[kind] = {"milliseconds": timings_json(times), "speedup": ratio(times, best, "ours")}
        if isinstance(taken := times["ours"], Timing):
            more = 1.0 if kind == "forward" else 1 + BACKWARD
            row[kind] |= shares(taken, peak, flops=more * flops, moved=more * moved)
    return row | {"asked_forward": ASKED.get(tokens)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run and publish; without a GPU print one line."""
    options = parser(__doc__)
    options.set_defaults(repeats=20)
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    options.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--kv-heads", type=int, default=8)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--window", type=int, default=64)
    chosen = arguments(options, argv, SMALL)
    device = device_for(chosen, "benchmarks.window_gpu", argv)
    if device is None:
        return
    dtype = torch.float32 if chosen.interpret else torch.bfloat16
    clock = Clock(device)
    small = {"side": 64, "size": 2**16} if chosen.interpret else {}
    peak = peaks(clock, dtype, **small)
    setting = {key: value for key, value in vars(chosen).items() if key != "out"}
    setting |= {"dtype": str(dtype), "measured_peaks": vars(peak), **facts(device)}
    asked = "forward at least at FlashAttention-2's time at 1024 tokens, 8 times as fast at 32768"
    shapes = [
        AttentionShape(
            head_dim=dim,
            value_dim=dim,
            num_heads=chosen.heads,
            num_kv_heads=chosen.kv_heads,
            model_dim=chosen.heads * dim,
        )
        for dim in chosen.head_dim
    ]
    rows = (measure(clock, peak, shape, tokens, chosen, dtype) for shape in shapes for tokens in chosen.tokens)
    publish_each(asked, setting, rows, chosen.out)


if __name__ == "__main__":
    main()
