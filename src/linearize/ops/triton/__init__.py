"""Kernels in Triton. Multi-step ones go from one committed state over the accepted tail and on over the new tokens
(2408.15237, algorithm 2); `window_chunks/` is for training and prefill.

A multi-step launch reads the state once, writes the outputs asked for and the state after `commit` tokens, and nothing
between.
Every token is done by the same sums in the same order wherever a call begins and ends, and no kernel is built anew for
other numbers of tokens, so a text cut anywhere has the same bits (in the interpreter; not yet measured on a GPU).
Inputs in fp32, fp16 or bf16; sums and state in fp32.

| file | kernel | for |
|---|---|---|
| `recurrence.py` | q, k, v and decays as given | SSD, retention, gated linear attention, gated delta rule |
| `window_step.py` | window, feature maps, folded sum | LoLCATs, sliding window |
| `heads.py` | convolution, gates, recurrence, gated norm | Mamba-2 and Gated DeltaNet between their projections |
| `channels.py` | the selective scan as given | Mamba-1 |
| `mamba.py` | convolution, steps, scan, gate | Mamba-1 between its projections |
| `window_chunks/` | window, feature maps and folded sum over many tokens, forward and backward | training, prefill |
| `parts.py`, `window_parts.py`, `launch.py` | what the kernels, and what their callers share | |

Nothing here is imported before a kernel is asked for: `triton` is an extra.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.util import find_spec

import torch

from linearize.ops.dispatch import MAX_MULTI_TOKEN, Call

__all__ = ["MOST_TOKENS", "base_why_not_chosen", "fla_why_not_chosen", "has_fla", "has_triton", "why_not_chosen"]

MOST_TOKENS = 240  # of a call of a fused kernel: a slot of the convolution is a byte
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def has_triton() -> bool:
    """Whether triton can be imported; says nothing of a device."""
    return find_spec("triton") is not None


@cache
def has_fla() -> bool:
    """Whether flash-linear-attention is installed (its import takes seconds and happens at the first use)."""
    return find_spec("fla") is not None


def why_not_chosen(call: Call) -> str | None:
    """Why the multi-step kernels do not run a call; None: they do."""
    if call.device == "cuda" and call.tokens > MAX_MULTI_TOKEN:
        return f"more than {MAX_MULTI_TOKEN} tokens"
    if call.device == "cuda" and call.gradients:
        return "gradients are asked for"
    return base_why_not_chosen(call)


def unsupported(call: Call) -> str | None:
    """Why a call is beyond the multi-step kernels."""
    return base_unsupported(call) or ("it gives no gradients" if call.gradients else None)


def base_unsupported(call: Call) -> str | None:
    """Why a call is beyond every one of these kernels, in the interpreter (on CPU tensors) too."""
    if call.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return _unsupported_dtype(call)
    return base_why_not_chosen(call)


def _unsupported_dtype(call: Call) -> str | None:
    return None if call.dtype in _DTYPES else f"{str(call.dtype).removeprefix('torch.')} is computed in full"


def base_why_not_chosen(call: Call) -> str | None:
    """Why none of these kernels runs a call, whatever its size."""
    if call.device != "cuda":
        return f"the tensors are on {call.device}"
    if torch.compiler.is_compiling() and not call.opaque:
        return "torch.compile traces the backends in PyTorch"
    if (reason := _unsupported_dtype(call)) is not None:
        return reason
    return None if has_triton() else "triton is not installed"


def fla_why_not_chosen(call: Call) -> str | None:
    """Why fla's kernels do not run a call."""
    if call.device != "cuda":
        return f"the tensors are on {call.device}"
    if (reason := _unsupported_layout(call)) is not None:
        return reason
    if call.dtype not in _DTYPES:
        return f"{str(call.dtype).removeprefix('torch.')} is computed in full"
    return None if has_fla() else "flash-linear-attention is not installed"


def fla_unsupported(call: Call) -> str | None:
    """Why a call is beyond fla's kernels."""
    there = "fla" in sys.modules or has_fla()
    return _unsupported_layout(call) if there else "flash-linear-attention is not installed"


def _unsupported_layout(call: Call) -> str | None:
    static = call.layout.tail is not None
    return "its documents would be read from the device, which a static call must not" if static else None
