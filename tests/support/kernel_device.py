"""Where the cases of kernels run: on CPU tensors in Triton's interpreter, or (`LINEARIZE_KERNELS=cuda`) on a GPU, where
they take bf16 in the place of fp16. Imported before a case makes a tensor.
"""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("LINEARIZE_KERNELS", "cpu")
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16  # the interpreter's products in bf16 are wrong
torch.set_default_device(DEVICE)


def seeded(seed: int) -> torch.Generator:
    """A generator of numbers on that device."""
    return torch.Generator(DEVICE).manual_seed(seed)
