"""The calls whose exactness `exactness.py` measures: numbers that strain an operation, and its backends.

| case | what it strains |
|---|---|
| random | nothing: norms of 0.5 to 1.5 |
| peaked | exponentials: scores of tens, a softmax that is nearly one-hot |
| scales | heads side by side whose values differ by four powers of ten, a window factor of e^-14 |
| tiny | normalisers: features of 1e-12, no window |
| bent | soft cap, sinks, features that grow with their argument, the shared shift |
| long | sums over thousands of tokens |
| forgets | log decays from -1e-4 to -9 in one text |

Letters: B batch, H query heads, G key/value heads, T tokens, D head dimension, F columns of a feature map, N states, E
channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers import AttentionShape
from linearize.mixers.feature_maps import FeatureMap
from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear import decay_linear
from linearize.ops.recurrent.decay_linear import use_backend as use_decay
from linearize.ops.recurrent.gated_delta import gated_delta
from linearize.ops.recurrent.gated_delta import use_backend as use_delta
from linearize.ops.recurrent.selective_scan import selective_scan
from linearize.ops.recurrent.selective_scan import use_backend as use_scan
from linearize.ops.short_conv import short_conv
from linearize.ops.window_linear import WindowLinear, WindowLinearState, window_linear
from linearize.ops.window_linear import use_backend as use_window
from linearize.ops.window_linear.state import WindowBuffers

ROWS, HEADS, GROUPS, DIM, COLUMNS = 2, 4, 2, 32, 24
SHAPE = AttentionShape(
    num_heads=HEADS, num_kv_heads=GROUPS, head_dim=DIM, value_dim=DIM, model_dim=HEADS * DIM
)  # SDPA's fast kernels want equal key and value dimensions
SCALING = DIM**-0.5
RECURRENCES = ("decay per head", "decay per key", "gated delta", "selective scan")
FORWARD_ONLY = ("triton", "in_place")  # forms that give no gradients
STEEP = 2.5  # standard deviation of a map's weights where features are to be tiny
EXPONENTS = 2**0.5 * STEEP * DIM**0.5  # then SDPA gets scores as large as the sum of two features' exponents


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """An operation on given numbers. `inputs`: fp64, in the order of `run(form, inputs)`, which gives y; the first
    `differentiated` of them get gradients. `attention`: q, k, v of the softmax attention it is compared with.
    `backends`: its backends and how many of the last tokens each is asked for (0: all)."""

    operation: str
    case: str
    inputs: tuple[Tensor, ...]
    run: Callable[[str, Sequence[Tensor]], Tensor]
    attention: tuple[Tensor, Tensor, Tensor]
    backends: dict[str, int]
    differentiated: int = 3


def qkv(tokens: int, case: str, *, groups: int = GROUPS, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, fp64."""
    torch.manual_seed(len(case) + tokens)
    made = [torch.randn(rows, n, tokens, DIM).double() for n in (HEADS, groups, groups)]
    q, k, v = (x * (0.5 + torch.rand(x.shape[1], 1, DIM)) for x in made)
    if case == "peaked":
        q, k = 5 * q, 3 * k
    if case == "scales":
        q = q * torch.logspace(-1, 0.7, HEADS)[:, None, None]
        v = v * torch.logspace(-2, 2, groups)[:, None, None]
    return q, k, v


def windowed(case: str, like: Tensor) -> WindowLinear:
    """The options of a case; parameters in at least fp32, equal in value for every dtype."""
    torch.manual_seed(7)
    device, dtype = like.device, like.dtype
    names = {"tiny": "hedgehog", "bent": "gain", "scales": "t2r"}
    wide = torch.promote_types(dtype, torch.float32)
    maps = [FeatureMap(names.get(case, "hedgehog"), SHAPE, COLUMNS, "identity") for _ in "qk"]  # type: ignore[arg-type]
    for feature in maps:
        for parameter in feature.parameters():
            parameter.data = (torch.randn(parameter.shape) * (STEEP if case == "tiny" else 0.3)).to(device, wide)
            parameter.requires_grad_(False)
    options: dict[str, Any] = {"window": 16, "shape": "terraced", "num_sinks": 0}
    if case in ("bent", "peaked"):
        options = {"window": 15, "shape": "sliding", "num_sinks": 3}
    if case == "bent":
        options |= {"softcap": 2.5, "shared_shift": True}
    factor = torch.full((HEADS,), -14.0) if case in ("tiny", "scales") else -torch.rand(HEADS)
    return WindowLinear(
        scaling=SCALING,
        feature_q=maps[0],
        feature_k=maps[1],
        log_window_factor_H=factor.to(device, wide),
        **options | ({"window": 0} if case == "tiny" else {}),
    )


def in_chunks(backend: str, inputs: Sequence[Tensor], late: int, chunk: int, run: Callable[..., Any]) -> Tensor:
    """y of the last `late` tokens, `chunk` at a time by `backend`; those before them by the backend that is chosen."""
    tokens, state, ys = inputs[0].shape[2], None, []
    edges = [0, *range(tokens - late, tokens, chunk), tokens]
    for a, b in itertools.pairwise(edges):
        y, state = run(backend if a else "", [x[:, :, a:b] for x in inputs], Layout(a), state)
        ys.append(y)
    return torch.cat(ys[1:], dim=2)


def window_problem(case: str, tokens: int, backends: dict[str, int], rows: int = ROWS) -> Problem:
    """Window + linear attention."""

    def call(backend: str, inputs: Sequence[Tensor], layout: Layout, state: Any) -> Any:
        spec = windowed(case, inputs[0])
        if not backend:
            return window_linear(*inputs, spec=spec, layout=layout, state=state)
        if backend == "triton_chunks" and not inputs[0].is_cuda:
            return small_chunks(inputs, spec, layout)
        if backend == "in_place":
            state = WindowBuffers.of(state, spec, most=8) if isinstance(state, WindowLinearState) else state
            position = layout.positions(inputs[0].shape[2], inputs[0].device).expand(len(inputs[0]), -1)
            layout = Layout(position_BT=position, tail=0)
        with use_window(backend):
            return window_linear(*inputs, spec=spec, layout=layout, state=state)

    def run(backend: str, inputs: Sequence[Tensor]) -> Tensor:
        late = backends.get(backend, 0)
        if late:
            return in_chunks(backend, inputs, late, 1 if backend == "step" else 8, call)
        y: Tensor = call(backend, inputs, Layout(), None)[0]
        return y

    q, k, v = qkv(tokens, case, rows=rows)
    attention = (EXPONENTS * q, k, v) if case == "tiny" else (q, k, v)
    return Problem(
        operation="window_linear", case=case, inputs=(q, k, v), run=run, attention=attention, backends=backends
    )


def small_chunks(inputs: Sequence[Tensor], spec: WindowLinear, layout: Layout) -> Any:
    """The kernels over chunks in the interpreter: as many of their steps on a short text."""
    from linearize.ops.triton.window_chunks.run import window_linear_chunks
    from linearize.ops.triton.window_chunks.sizes import Sizes

    return window_linear_chunks(*inputs, spec=spec, layout=layout, sizes=Sizes(16, 2))


def _by(op: Callable[..., Any], use: Callable[[str], Any]) -> Callable[[str, Sequence[Tensor]], Tensor]:
    """An operation by a form of its own."""

    def run(backend: str, inputs: Sequence[Tensor]) -> Tensor:
        with use(backend):
            y: Tensor = op(*inputs, layout=Layout(), need_state=False)[0]
        return y

    return run


def recurrent_problem(operation: str, case: str, tokens: int, backends: dict[str, int], rows: int = ROWS) -> Problem:
    """A recurrence: `decay per head`, `decay per key`, `gated delta`, `selective scan` or `short conv`."""
    q, k, v = qkv(tokens, case, groups=HEADS, rows=rows)
    per_key = operation == "decay per key"
    size = k.shape if per_key else k.shape[:3]
    decay = -F.softplus(torch.randn(size).double() - 2)
    if case == "forgets":
        decay = -torch.logspace(-4, 0.95, 97).double()[torch.randint(97, size)]
    common: dict[str, Any] = {"operation": operation, "case": case, "attention": (q, k, v), "backends": backends}
    if operation.startswith("decay"):
        return Problem(inputs=(q * SCALING, k, v, decay), run=_by(decay_linear, use_decay), **common)
    if operation == "gated delta":
        unit, beta = k / k.norm(dim=-1, keepdim=True), torch.rand(rows, HEADS, tokens).double()
        return Problem(inputs=(q * SCALING, unit, v, decay, beta), run=_by(gated_delta, use_delta), **common)
    x = v.transpose(1, 2).flatten(2)
    if operation == "short conv":
        weight, bias = torch.randn(x.shape[2], 4).double(), torch.randn(x.shape[2]).double()
        run = lambda backend, inputs: short_conv(*inputs, layout=Layout(), need_state=False)[0]  # noqa: E731
        return Problem(inputs=(x, weight, bias), run=run, differentiated=1, **common)
    steps, A = F.softplus(torch.randn(x.shape).double() - 2), -torch.arange(1.0, 17).double().repeat(x.shape[2], 1)
    B, C = (torch.randn(rows, tokens, GROUPS, 16).double() for _ in "BC")
    scan = _by(selective_scan, use_scan)
    order = lambda backend, t: scan(backend, (t[0], t[3], t[4], t[1], t[2]))  # noqa: E731
    return Problem(inputs=(x, B, C, steps, A), run=order, **common)


def problems(*, quick: bool = False) -> Iterator[Problem]:
    """For the forms in PyTorch; `quick`: no long texts."""
    last_tokens = {"reference": 0, "chunked": 0, "step": 11, "multi_token": 24, "in_place": 24}
    for case in ("random", "peaked", "scales", "tiny", "bent"):
        backends = {
            name: n for name, n in last_tokens.items() if name != "multi_token" or case != "tiny"
        }  # it is for windows
        yield window_problem(case, 131, backends)
    for operation in RECURRENCES:
        yield recurrent_problem(operation, "random", 29, {"reference": 0, "multi_token": 0, "chunked": 0})
        yield recurrent_problem(operation, "scales", 131, {"reference": 0, "chunked": 0})
        if operation != "selective scan":
            yield recurrent_problem(operation, "forgets", 131, {"reference": 0, "chunked": 0})
    yield recurrent_problem("short conv", "scales", 131, {"reference": 0})
    if not quick:
        yield window_problem("long", 1319, {"chunked": 0})
        for operation in RECURRENCES:
            yield recurrent_problem(operation, "long", 1319 if operation != "selective scan" else 509, {"chunked": 0})


def kernel_problems(*, quick: bool = False) -> Iterator[Problem]:
    """For the kernels in Triton's interpreter (fp32 and fp16: its products in bf16 are wrong), or on a GPU."""
    for case in ("tiny", "bent") if quick else ("peaked", "scales", "tiny", "bent"):
        yield window_problem(case, 29 if quick else 67, {"triton": 8 if quick else 16, "triton_chunks": 0}, rows=1)
    for operation in RECURRENCES:
        yield recurrent_problem(operation, "scales", 7 if quick else 13, {"triton": 0}, rows=1)
