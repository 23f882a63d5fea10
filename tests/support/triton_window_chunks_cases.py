"""Cases of `test_triton_window_chunks.py`: run by it with TRITON_INTERPRET=1 in a process of their own, where kernels
run on CPU tensors. Prints one JSON object: for each case the errors relative to fp64, or a traceback.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kernel_device import HALF
from torch import Tensor
from triton_cases import gap, padded, poison

from linearize.mixers import AttentionShape
from linearize.mixers.feature_maps import FeatureMap
from linearize.ops.layout import Layout
from linearize.ops.triton.window_chunks import backward, run
from linearize.ops.triton.window_chunks.sizes import Sizes
from linearize.ops.window_linear import Branch, WindowLinear
from linearize.ops.window_linear.reference import reference

TOKENS, COLUMNS = 37, 5
SHAPE = AttentionShape(num_heads=2, num_kv_heads=1, head_dim=6, value_dim=10, model_dim=11)
# Row 0: three padding tokens, then documents of 14 and 20 tokens. Row 1: documents of 35 and 2.
RAGGED = torch.full((2, TOKENS), -1)
RAGGED[0, 3:17], RAGGED[0, 17:] = torch.arange(14), torch.arange(20)
RAGGED[1, :35], RAGGED[1, 35:] = torch.arange(35), torch.arange(2)

LATE = torch.tensor([[7], [1]])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting of the operation."""

    map: Any = "hedgehog"
    columns: int = COLUMNS
    shape: Any = "terraced"
    window: int = 16
    sinks: int = 0
    shared: bool = False
    softcap: float | None = None
    ragged: bool = True
    late: bool = False  # documents begin above position 0
    branch: Branch = "both"
    dtype: torch.dtype = torch.float32
    cut: int | None = None  # the text in two calls
    backward: bool = True
    chunk: int = 16


def layouts(case: Case) -> list[tuple[slice, Layout]]:
    """The calls of a case."""
    edges = [0, TOKENS] if case.cut is None else [0, case.cut, TOKENS]
    position = torch.where(RAGGED < 0, RAGGED, RAGGED + LATE) if case.late else RAGGED
    whole = Layout(position_BT=position) if case.ragged else Layout()
    return [(slice(a, b), whole.part(a, b)) for a, b in itertools.pairwise(edges)]


def tensors(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any], list[Tensor]]:
    """q, k, v amid NaN; the maps and factors; and all that gets a gradient. Equal in value for every dtype."""
    torch.manual_seed(5)
    rows = 2 if case.ragged else 1
    sizes = ((SHAPE.num_heads, 6), (SHAPE.num_kv_heads, 6), (SHAPE.num_kv_heads, 10))
    qkv = [torch.randn(rows, h, TOKENS, d).to(case.dtype).to(dtype) for h, d in sizes]
    qkv = [padded(x).requires_grad_() for x in qkv]
    wide = torch.promote_types(dtype, torch.float32)
    maps = [FeatureMap(case.map, SHAPE, case.columns, "identity").to(wide) for _ in range(2)]
    parameters = [p for m in maps for p in m.parameters()]
    for parameter in parameters:
        parameter.data = (0.7 * torch.randn(parameter.shape)).to(wide)
    # The factor of the linear term is above 0, or its normaliser could vanish.
    factors = [x.to(wide).requires_grad_() for x in (torch.randn(SHAPE.num_heads), 0.2 + torch.rand(SHAPE.num_heads))]
    spec = {"feature_q": maps[0], "feature_k": maps[1]}
    spec |= {"log_window_factor_H": factors[0], "linear_factor_H": factors[1]}
    return qkv, spec, [*qkv, *factors, *parameters]


def run_with(backend: Callable[..., Any], case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, the last state's sum, gradients."""
    (q, k, v), options, leaves = tensors(case, dtype)
    spec = WindowLinear(
        window=case.window, shape=case.shape, scaling=0.4, num_sinks=case.sinks, softcap=case.softcap,
        shared_shift=case.shared, branch=case.branch, **options,
    )  # fmt: skip
    state, ys = None, []
    for part, layout in layouts(case):
        y, state = backend(q[:, :, part], k[:, :, part], v[:, :, part], spec=spec, layout=layout, state=state)
        ys.append(y)
    y = torch.cat(ys, dim=2)
    assert state is not None
    results = {"y": y.detach(), "memory": state.memory_BHFV.detach(), "ring": state.k_BGRD.detach()}
    if case.backward:
        torch.manual_seed(7)
        d_y = torch.randn(y.shape).to(case.dtype).to(y.dtype)
        grads = torch.autograd.grad(y, leaves, d_y, allow_unused=True)
        results |= {
            f"d{i}": torch.zeros_like(x) if g is None else g for i, (x, g) in enumerate(zip(leaves, grads, strict=True))
        }
    return results


def errors(case: Case) -> dict[str, float]:
    """Largest error of each tensor, over its largest number if that is above 1."""
    kernels = partial(run.window_linear_chunks, sizes=Sizes(case.chunk, 2))
    right, got = run_with(reference, case, torch.float64), run_with(kernels, case, case.dtype)
    assert right.keys() == got.keys()
    results = {}
    for name, x in right.items():
        assert x.shape == got[name].shape, name
        off = gap(x, got[name])
        results[name] = off / max(x.abs().max().item(), 1.0) if x.numel() else off
    return results


CASES: dict[str, Case] = {
    "blocks": Case(),
    "beyond": Case(map="t2r", shape="sliding", window=9, sinks=2, shared=True, softcap=3.0),
    "given features": Case(map="gain", shape="sliding", window=16, sinks=1, ragged=False),
    "no window": Case(map="elu", window=0, ragged=False),
    "window alone": Case(shape="sliding", window=7, sinks=1, branch="window", ragged=False),
    "half": Case(window=5, dtype=HALF, ragged=False),
    "above 0": Case(map="t2r", shape="sliding", window=9, sinks=3, late=True, softcap=30.0),
    "above 0, two calls": Case(map="t2r", window=5, sinks=3, late=True, cut=21, backward=False),
    "parts": Case(map="t2r", window=9, shape="sliding", columns=70, sinks=1),
    "given parts": Case(map="gain", columns=70, ragged=False),
    "queries in tiles": Case(map="t2r", shape="sliding", window=20, sinks=1, chunk=32),
    "two calls": Case(map="t2r", sinks=1, cut=21, backward=False),
}


def main() -> None:
    """All cases, or those named."""
    torch.set_num_threads(1)
    backward.TILE = 16  # more than one of them in a chunk of 32
    poison()
    results: dict[str, Any] = {}
    for name in sys.argv[1:] or CASES:
        try:
            results[name] = errors(CASES[name])
        except Exception:
            results[name] = {"error": traceback.format_exc()[-3000:]}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
