"""Multi-step kernels in Triton: from one committed state over the accepted tail and on over the new tokens (2408.15237,
algorithm 2).

One launch reads the state once, writes the outputs asked for and the state after `commit` tokens, and nothing between.
Every token is done by the same sums in the same order wherever a call begins and ends, and no kernel is built anew for
other numbers of tokens, so a text cut anywhere has the same bits (in the interpreter; not yet measured on a GPU).
Inputs in fp32, fp16 or bf16; sums and state in fp32.

| file | kernel | for |
|---|---|---|
| `recurrence.py` | q, k, v and decays as given | SSD, retention, gated linear attention, gated delta rule |
| `heads.py` | convolution, gates, recurrence, gated norm | Mamba-2 and Gated DeltaNet between their projections |
| `channels.py` | the selective scan as given | Mamba-1 |
| `mamba.py` | convolution, steps, scan, gate | Mamba-1 between its projections |
| `parts.py`, `launch.py` | what the kernels, and what their callers share | |

Nothing here is imported before a kernel is asked for: `triton` is an extra.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["MOST_TOKENS", "has_triton", "takes"]

MOST_TOKENS = 240  # of a call of a fused kernel: a slot of the convolution is a byte
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def has_triton() -> bool:
    """Whether triton can be imported; says nothing of a device."""
    return find_spec("triton") is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels run this call: CUDA tensors in at most fp32, no gradients asked, triton installed."""
    if not all(x.is_cuda and x.dtype in _DTYPES for x in tensors) or not has_triton():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
