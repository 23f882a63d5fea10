"""Compile every kernel for GPUs that need not be present: what builds, the build time, and the registers.

The arguments are those that the callers in `ops/triton` make: each is called on CPU tensors, its launch is recorded
instead of run, and what was recorded is compiled.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import parser, publish
from linearize.ops.layout import Layout

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ROWS, TOKENS, COMMIT = 2, 9, 4
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory that a program may have
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Replaces a kernel and records its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def kernels() -> dict[str, list[Any]]:
    """Every kernel of `ops/triton` (functions called `..._kernel`; the others are parts of them) and the modules that
    know it under its name."""
    import linearize.ops.triton as package

    results: dict[str, list[Any]] = {}
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name in vars(module):
            if name.endswith("_kernel"):
                results.setdefault(name, []).append(module)
    return results


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record every kernel's launches inside the `with` block in a list."""
    launches: list[Launch] = []
    places = [(module, name, getattr(module, name)) for name, modules in kernels().items() for module in modules]
    for module, name, kernel in places:
        setattr(module, name, Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in places:
            setattr(module, name, kernel)


def calls(dtype: torch.dtype, *, key_dim: int = 64, value_dim: int = 64) -> dict[str, Callable[[], Any]]:
    """One call of each entry of `ops/triton`, ragged, from a state, in place: every branch is in the kernel."""
    from linearize.ops.triton.channels import selective_scan_steps
    from linearize.ops.triton.fused_heads import HeadSizes, gated_delta_net_steps
    from linearize.ops.triton.launch import WHOLE_TILE, power_of_two
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
        "mamba2": mamba2_call(dtype, key_dim, value_dim),
        "mamba2, heads in parts": mamba2_call(dtype, key_dim, 2 * WHOLE_TILE // power_of_two(key_dim)),
        "gated_delta_net": lambda: gated_delta_net_steps(
            some(*rows, columns),
            *(some(*rows, heads), some(*rows, heads), some(*rows, inner)),
            norm_weight_V=some(value_dim),
            **fused,
        ),
        **near,
    }


def mamba2_call(dtype: torch.dtype, key_dim: int, value_dim: int) -> Callable[[], Any]:
    """Mamba-2 between its projections; where a program holds a part of a head, its norm is a launch of its own."""
    from linearize.ops.triton.fused_heads import HeadSizes, mamba2_steps

    heads, groups, taps, new = 4, 2, 4, TOKENS - COMMIT
    channels, inner = heads * (2 * key_dim + value_dim), heads * value_dim
    columns = groups * (key_dim + value_dim) + heads * key_dim
    state = torch.zeros(ROWS, heads, key_dim, value_dim)
    options: dict[str, Any] = {"memory": state, "memory_out": state, "outputs": new, "commit": COMMIT, "eps": 1e-6}
    options["sizes"] = HeadSizes(heads=heads, groups=groups, key_dim=key_dim, value_dim=value_dim, repeat="before")
    options["layout"] = Layout(position_BT=torch.arange(TOKENS).expand(ROWS, -1))
    weights = {"conv_weight_CW": (channels, taps), "conv_bias_C": (channels,), "norm_weight": (inner,)}
    options |= {name: torch.zeros(size, dtype=dtype) for name, size in weights.items()}
    options |= {name: torch.zeros(heads) for name in ("dt_bias_H", "A_log_H", "D_H")}
    options["taps_BPC"] = torch.zeros(ROWS, taps - 1, channels, dtype=dtype)
    return lambda: mamba2_steps(torch.zeros(ROWS, TOKENS, inner + columns + heads, dtype=dtype), **options)


def window_calls(dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, Callable[[], Any]]:
    """The window + linear kernel with all options, in place and not; and a window alone."""
    from linearize.mixers import AttentionShape
    from linearize.mixers.feature_maps import FeatureMap
    from linearize.ops.triton.window import window_linear_steps
    from linearize.ops.window_linear import WindowLinear, WindowLinearState
    from linearize.ops.window_linear.state import WindowBuffers

    heads, groups, sinks, window = 4, 2, 4, 64
    shape = AttentionShape(
        num_heads=heads, num_kv_heads=groups, head_dim=key_dim, value_dim=value_dim, model_dim=heads * key_dim
    )
    feature, ones = FeatureMap("gain", shape, key_dim // 2, "identity"), torch.ones(heads)
    more: dict[str, Any] = {"window": window, "scaling": 1.0, "num_sinks": sinks, "softcap": 30.0}
    maps: dict[str, Any] = {"feature_q": feature, "feature_k": feature, "log_window_factor_H": ones}
    full = WindowLinear(shape="terraced", shared_shift=True, linear_factor_H=ones, **maps, **more)
    alone = WindowLinear(shape="sliding", **more)
    inputs = [torch.zeros(ROWS, n, TOKENS, d, dtype=dtype) for n, d in ((groups, key_dim), (groups, value_dim))]
    q = torch.zeros(ROWS, heads, TOKENS - COMMIT, key_dim, dtype=dtype)
    layout = Layout(position_BT=torch.arange(TOKENS).expand(ROWS, -1))

    (k, v), (sink_k, sink_v) = (
        [x.new_zeros(*x.shape[:2], count, x.shape[3]) for x in inputs] for count in (2 * window - 1, sinks)
    )
    memory = torch.zeros(ROWS, heads, feature.num_features, value_dim + 1)
    state = WindowLinearState(torch.zeros(ROWS, dtype=torch.int64), k, v, memory, sink_k, sink_v)

    def call(spec: WindowLinear, held: Any) -> Callable[[], Any]:
        return lambda: window_linear_steps(q, *inputs, spec=spec, layout=layout, state=held, commit=COMMIT)

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


def compile_launch(launch: Launch, arch: int) -> Any:
    """The compiled kernel of one recorded launch for compute capability `arch` (80: 8.0)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, options = launch
    named = dict(zip(kernel.arg_names, args, strict=False))
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = {name: _type(value) for name, value in named.items()} | dict.fromkeys(constants, "constexpr")
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, (name, value) in enumerate(named.items()):
        if name not in fixed and name not in constants:
            attributes |= _aligned((place,), value)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    asked = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=asked)


def _aligned(place: tuple[int, ...], value: Any) -> dict[tuple[int, ...], list[list[Any]]]:
    """The properties of arguments at a real launch: addresses and numbers that are divisible by 16."""
    if isinstance(value, tuple):
        parts = [_aligned((*place, at), part) for at, part in enumerate(value)]
        return {key: known for part in parts for key, known in part.items()}
    divides = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
    return {place: [["tt.divisibility", 16]]} if divides else {}


def _type(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(part) for part in value)
    return "fp32" if isinstance(value, float) else "i32"


def registers(cubin: bytes) -> dict[str, int]:
    """`registers` of a thread and `stack_bytes`: what did not fit into them and is in memory (spills)."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert match is not None, shown
    return {"registers": int(match[1]), "stack_bytes": int(match[2])}


def compiled_row(launch: Launch, arch: int) -> dict[str, Any]:
    """The result of compiling one launch for one GPU generation."""
    began = time.perf_counter()
    made = compile_launch(launch, arch)
    seconds = time.perf_counter() - began
    return {
        "kernel": launch[0].__name__,
        "arch": arch,
        "seconds": round(seconds, 2),
        "cubin_bytes": len(made.asm["cubin"]),
        "shared_bytes": made.metadata.shared,
        "fits": made.metadata.shared <= SHARED_LIMIT.get(arch, max(SHARED_LIMIT.values())),
        "warps": made.metadata.num_warps,
        **registers(made.asm["cubin"]),
    }


def compile_all(
    arches: Sequence[int], dtype: torch.dtype, *, key_dim: int = 64, value_dim: int = 64, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One row per kernel and GPU generation; an error raises."""
    rows = []
    for name, call in calls(dtype, key_dim=key_dim, value_dim=value_dim).items():
        if only and name not in only:
            continue
        with recording() as launches:
            call()
        rows += [{"call": name, **compiled_row(launch, arch)} for launch in launches for arch in arches]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and publish: seconds, bytes, registers, spills of each kernel, dtype, head size and GPU generation."""
    from linearize.ops.triton import has_triton

    options = parser(__doc__)
    options.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities")
    options.add_argument("--dtype", nargs="+", choices=["float32", "float16", "bfloat16"], default=["bfloat16"])
    options.add_argument("--head-dim", type=int, nargs="+", default=[64])
    options.add_argument("--only", nargs="*", default=[], help="some calls: " + ", ".join(calls(torch.float32)))
    chosen = options.parse_args(arguments)
    if not has_triton():
        raise SystemExit("needs triton: pip install triton")
    rows = []
    for dtype in chosen.dtype:
        for dim in chosen.head_dim:
            made = compile_all(chosen.arch, getattr(torch, dtype), key_dim=dim, value_dim=dim, only=chosen.only)
            rows += [{"dtype": dtype, "head_dim": dim, **row} for row in made]
    setting = {"triton": version("triton"), "shared_limit": SHARED_LIMIT, "compute_capabilities": chosen.arch}
    publish("every kernel builds for GPUs that need not be there", setting, rows, chosen.out)


if __name__ == "__main__":
    main()
