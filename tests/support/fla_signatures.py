"""The functions of fla 0.6.0 that we call, with its very parameters and refusals, computed token by token.

Copied: the parameter lists and the checks of `fla/ops/{simple_gla,gla,gated_delta_rule}/chunk.py`. Inputs are
`[B, T, H, ...]`; with `cu_seqlens` B is 1 and states are `[sequences, H, K, V]`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.recurrent import decay_linear, gated_delta


def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, state_v_first: bool = False,
    cu_seqlens: Any = None, cu_seqlens_cpu: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    assert g_gamma is None and not state_v_first and not kwargs and g is not None and g.shape == q.shape[:3]
    return run(decay_linear.BACKENDS["reference"], (q, k, v, g), scale, initial_state, output_final_state, cu_seqlens)


def chunk_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: int | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, state_v_first: bool = False, cu_seqlens: Any = None, cu_seqlens_cpu: Any = None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    assert q.shape == k.shape == g.shape, "q, k, g must have the same shape."
    return run(decay_linear.BACKENDS["reference"], (q, k, v, g), scale, initial_state, output_final_state, cu_seqlens)


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
    cu_seqlens: Any = None, cu_seqlens_cpu: Any = None, chunk_indices: Any = None, cp_context: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    assert (
        not (use_qk_l2norm_in_kernel or use_beta_sigmoid_in_kernel or kwargs) and g.shape == beta.shape == q.shape[:3]
    )
    inputs = (q, k, v, g, beta)
    return run(gated_delta.BACKENDS["reference"], inputs, scale, initial_state, output_final_state, cu_seqlens)


def run(
    reference: Any, inputs: tuple[Tensor, ...], scale: float | None, state: Tensor | None, final: bool, bounds: Any
) -> tuple[Tensor, Tensor | None]:
    """Every sequence by itself from its own state."""
    assert all(x.is_contiguous() for x in inputs)
    q, k, v, *gates = inputs
    assert q.dtype == k.dtype == v.dtype and all(x.dtype != torch.bfloat16 for x in gates)
    assert v.shape == (*q.shape[:3], v.shape[-1]) and all(x.shape[:2] == q.shape[:2] for x in inputs)
    if bounds is not None:
        if q.shape[0] != 1:
            raise ValueError(f"The batch size is expected to be 1 rather than {q.shape[0]} when using `cu_seqlens`.")
        if state is not None and state.shape[0] != len(bounds) - 1:
            raise ValueError(f"{len(bounds) - 1} initial states are expected rather than {state.shape[0]}.")
        assert bounds.dtype == torch.int64 and bool((bounds.diff() > 0).all()) and bounds[-1] == q.shape[1]
    wide = torch.promote_types(v.dtype, torch.float32)
    assert state is None or state.dtype == wide, "initial_state must be in float32."
    scaled = [x.to(wide).transpose(1, 2) for x in (q * (q.shape[-1] ** -0.5 if scale is None else scale), *inputs[1:])]
    if bounds is None:
        y, after = reference(*scaled, layout=Layout(), state=state)
    else:
        parts = []
        for n, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            before = None if state is None else state[n : n + 1]
            parts.append(reference(*(x[:, :, first:last] for x in scaled), layout=Layout(), state=before))
        y, after = torch.cat([p[0] for p in parts], dim=2), torch.cat([p[1] for p in parts])
    return y.transpose(1, 2).to(v.dtype), after if final else None


def install(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts these in fla's place; gives the list of keyword arguments that calls fill."""
    calls: list[dict[str, Any]] = []

    def recorded(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(options)
            return function(*args, **options)

        return call

    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    files = {"simple_gla": chunk_simple_gla, "gla": chunk_gla, "gated_delta_rule": chunk_gated_delta_rule}
    for file, function in files.items():
        module = ModuleType(f"fla.ops.{file}")
        setattr(module, function.__name__, recorded(function))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls
