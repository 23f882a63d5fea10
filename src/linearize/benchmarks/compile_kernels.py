"""Compile every multi-step kernel for GPUs that need not be there: what builds, in which time, with how many registers.

The arguments are those that the callers in `ops/triton` make: each is called on CPU tensors, its launch is recorded
instead of run, and what was recorded is compiled.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from linearize.ops.layout import Layout

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ROWS, TOKENS, COMMIT = 2, 9, 4


class Recorder:
    """Stands in the place of a kernel: keeps the launches it is asked for."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@contextmanager
def recording() -> Any:
    """Inside the `with` block every kernel's launches go to the list given."""
    from linearize.ops.triton import channels, fused_heads, mamba, recurrence, window
    from linearize.ops.triton.window_chunks import attend, carry, gradients, key_gradients

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    places = [(recurrence, "recurrence_kernel"), (channels, "scan_kernel"), (mamba, "mamba_kernel")]
    places += [(fused_heads, "heads_kernel"), (fused_heads, "norm_kernel"), (window, "window_kernel")]
    places += [(attend, "attend_kernel"), (gradients, "queries_kernel")]
    places += [(key_gradients, "keys_kernel"), (carry, "join_kernel")]
    places += [(carry, "runs_kernel"), (carry, "gradient_runs_kernel")]
    kernels = [getattr(module, name) for module, name in places]
    for (module, name), kernel in zip(places, kernels, strict=True):
        setattr(module, name, Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for (module, name), kernel in zip(places, kernels, strict=True):
            setattr(module, name, kernel)


def calls(dtype: torch.dtype, *, key_dim: int = 64, value_dim: int = 64) -> dict[str, Callable[[], Any]]:
    """One call of each entry of `ops/triton`, ragged, from a state, in place: every branch is in the kernel."""
    from linearize.ops.triton.channels import selective_scan_steps
    from linearize.ops.triton.fused_heads import HeadSizes, gated_delta_net_steps, mamba2_steps
    from linearize.ops.triton.mamba import ChannelSizes, mamba_steps
    from linearize.ops.triton.recurrence import decay_linear_steps, gated_delta_steps

    heads, groups, taps, size, new = 4, 2, 4, 16, TOKENS - COMMIT

    def some(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def wide(*shape: int) -> Tensor:
        return torch.zeros(*shape)

    layout = Layout(position_BT=torch.arange(TOKENS).expand(ROWS, -1))
    run: dict[str, Any] = {"layout": layout, "commit": COMMIT}
    state, queries, keys = wide(ROWS, heads, key_dim, value_dim), (ROWS, heads, new), (ROWS, heads, TOKENS)
    qkv = (some(*queries, key_dim), some(*keys, key_dim), some(*keys, value_dim))
    channels, rows, inner = heads * (2 * key_dim + value_dim), (ROWS, TOKENS), heads * value_dim
    columns = groups * (key_dim + value_dim) + heads * key_dim
    sizes = HeadSizes(heads=heads, groups=groups, key_dim=key_dim, value_dim=value_dim, repeat="before")
    fused: dict[str, Any] = {"sizes": sizes, "eps": 1e-6, "outputs": new, "memory": state, "memory_out": state, **run}
    fused |= {"taps_BPC": some(ROWS, taps - 1, channels), "conv_weight_CW": some(channels, taps)}
    fused |= {"dt_bias_H": wide(heads), "A_log_H": wide(heads)}
    total = heads * key_dim
    split = ChannelSizes(heads=heads, groups=groups, head_dim=key_dim, state_dim=size, repeat="before")
    scan: dict[str, Any] = {
        "sizes": split,
        "memory": wide(ROWS, total, size),
        "taps_BPC": some(ROWS, taps - 1, total),
        "outputs": new,
        **run,
    }
    scan |= {"conv_weight_CW": some(total, taps), "conv_bias_C": some(total), "dt_bias_E": wide(total)}
    near = window_calls(dtype, key_dim, value_dim) | chunk_calls(dtype, key_dim)
    shared = (some(ROWS, groups, TOKENS, key_dim), some(ROWS, groups, TOKENS, value_dim))
    return {
        "decay per head": lambda: decay_linear_steps(*qkv, wide(*keys), state=state, norm_eps=1e-5, **run),
        "decay per key": lambda: decay_linear_steps(
            qkv[0], *shared, shared[0], state=state[:, :groups].clone(), gate_divisor=16.0, **run
        ),
        "gated delta": lambda: gated_delta_steps(*qkv, wide(*keys), wide(*keys), state=state, **run),
        "selective scan": lambda: selective_scan_steps(
            *(some(*rows, total), wide(*rows, total), wide(total, size)),
            *(some(*rows, total // size, size), some(ROWS, new, total // size, size)),
            state=wide(ROWS, total, size),
            **run,
        ),
        "mamba": lambda: mamba_steps(
            some(*rows, 2 * (heads + groups) * key_dim),
            some(*rows, total),
            A_log_EN=wide(total, size),
            D_E=wide(total),
            **scan,
        ),
        "mamba2": lambda: mamba2_steps(
            some(*rows, inner + columns + heads),
            conv_bias_C=some(channels),
            D_H=wide(heads),
            norm_weight=some(inner),
            **fused,
        ),
        "gated_delta_net": lambda: gated_delta_net_steps(
            some(*rows, columns),
            *(some(*rows, heads), some(*rows, heads), some(*rows, inner)),
            norm_weight_V=some(value_dim),
            **fused,
        ),
        **near,
    }


def window_calls(dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, Callable[[], Any]]:
    """The window + linear kernel with all it has, in place and not; and a window alone."""
    from linearize.mixers import AttentionShape
    from linearize.mixers.feature_maps import FeatureMap
    from linearize.ops.triton.window import window_linear_steps
    from linearize.ops.window_linear import WindowLinear, WindowLinearState
    from linearize.ops.window_linear.buffers import WindowBuffers

    heads, groups, sinks, window = 4, 2, 4, 64
    shape = AttentionShape(
        num_heads=heads, num_kv_heads=groups, head_dim=key_dim, value_dim=value_dim, model_dim=heads * key_dim
    )
    feature, ones = FeatureMap("gain", shape, key_dim // 2, "identity"), torch.ones(heads)
    more: dict[str, Any] = {"window": window, "scaling": 1.0, "num_sinks": sinks, "softcap": 30.0}
    maps: dict[str, Any] = {"feature_q": feature, "feature_k": feature, "log_window_factor_H": ones}
    full = WindowLinear(shape="terraced", shared_shift=True, linear_factor_H=ones, **maps, **more)
    alone = WindowLinear(shape="sliding", **more)
    given = [torch.zeros(ROWS, n, TOKENS, d, dtype=dtype) for n, d in ((groups, key_dim), (groups, value_dim))]
    q = torch.zeros(ROWS, heads, TOKENS - COMMIT, key_dim, dtype=dtype)
    layout = Layout(position_BT=torch.arange(TOKENS).expand(ROWS, -1))

    (k, v), (sink_k, sink_v) = (
        [x.new_zeros(*x.shape[:2], count, x.shape[3]) for x in given] for count in (2 * window - 1, sinks)
    )
    memory = torch.zeros(ROWS, heads, feature.num_features, value_dim + 1)
    state = WindowLinearState(torch.zeros(ROWS, dtype=torch.int64), k, v, memory, sink_k, sink_v)

    def call(spec: WindowLinear, held: Any) -> Callable[[], Any]:
        return lambda: window_linear_steps(q, *given, spec=spec, layout=layout, state=held, commit=COMMIT)

    buffers = WindowBuffers.of(state, full, most=COMMIT)
    return {"window + linear": call(full, state), "in place": call(full, buffers), "window": call(alone, state)}


def chunk_calls(dtype: torch.dtype, head_dim: int) -> dict[str, Callable[[], Any]]:
    """The kernels over many tokens: LoLCATs as published, forward and backward, from packed documents."""
    from linearize.mixers import AttentionShape
    from linearize.mixers.feature_maps import FeatureMap
    from linearize.ops.triton.window_chunks.run import window_linear_chunks
    from linearize.ops.window_linear import WindowLinear

    tokens, heads, groups = 5 * 64, 4, 2
    shape = AttentionShape(
        num_heads=heads, num_kv_heads=groups, head_dim=head_dim, value_dim=head_dim, model_dim=heads * head_dim
    )
    feature = FeatureMap("hedgehog", shape, min(64, head_dim), "identity")
    spec = WindowLinear(window=64, shape="terraced", scaling=1.0, feature_q=feature, feature_k=feature)
    layout = Layout(position_BT=torch.arange(tokens).expand(ROWS, -1) % (tokens - 70))

    def train() -> None:
        sizes = ((n, tokens, head_dim) for n in (heads, groups, groups))
        q, k, v = (torch.zeros(ROWS, *size, dtype=dtype, requires_grad=True) for size in sizes)
        y, _ = window_linear_chunks(q, k, v, spec=spec, layout=layout)
        y.sum().backward()

    return {"window chunks": train}


def compile_launch(launch: tuple[Any, tuple[Any, ...], dict[str, Any]], arch: int) -> Any:
    """The compiled kernel of one recorded launch for compute capability `arch` (80: 8.0)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, options = launch
    named = dict(zip(kernel.arg_names, args, strict=False))
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = {name: _type(value) for name, value in named.items()} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    asked = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=asked)


def _type(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(part) for part in value)
    return "fp32" if isinstance(value, float) else "i32"


def compile_all(
    arches: Sequence[int], dtype: torch.dtype, *, key_dim: int = 64, value_dim: int = 64, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One row per kernel and GPU generation: seconds, bytes of the cubin and of shared memory; an error raises."""
    rows = []
    for name, call in calls(dtype, key_dim=key_dim, value_dim=value_dim).items():
        if only and name not in only:
            continue
        with recording() as launches:
            call()
        for launch in launches:
            for arch in arches:
                began = time.perf_counter()
                made = compile_launch(launch, arch)
                rows.append(
                    {
                        "call": name,
                        "kernel": launch[0].__name__,
                        "arch": arch,
                        "seconds": round(time.perf_counter() - began, 2),
                        "cubin_bytes": len(made.asm["cubin"]),
                        "shared_bytes": made.metadata.shared,
                        "warps": made.metadata.num_warps,
                        "local_loads": made.asm["ptx"].count("ld.local"),
                    }
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and print a JSON list."""
    from linearize.ops.triton import has_triton

    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities")
    options.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    options.add_argument("--head-dim", type=int, nargs="+", default=[64])
    options.add_argument("--only", nargs="*", default=[], help="some calls: " + ", ".join(calls(torch.float32)))
    chosen = options.parse_args(arguments)
    if not has_triton():
        raise SystemExit("needs triton: pip install triton")
    rows = []
    for dim in chosen.head_dim:
        made = compile_all(chosen.arch, getattr(torch, chosen.dtype), key_dim=dim, value_dim=dim, only=chosen.only)
        rows += [{"head_dim": dim, **row} for row in made]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
