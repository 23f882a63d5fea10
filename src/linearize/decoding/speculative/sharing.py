"""One storage for weights that two models have in common: a teacher and its student, a target and its draft."""

from __future__ import annotations

import torch
from torch import nn


def share_equal_weights(model: nn.Module, other: nn.Module) -> int:
    """Make parameters of `model` that are equal, bit for bit, to those of the same name in `other` the same storage.

    Names are compared without a student's prefix `lm.`. Returns the bytes that were freed. Both models are meant for
    inference: training one of them would change the other.
    """
    known = {_name(name): parameter for name, parameter in other.named_parameters(remove_duplicate=False)}
    freed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            twin = known.get(_name(name))
            if twin is None or not _could_share(parameter, twin) or not torch.equal(_bits(parameter), _bits(twin)):
                continue
            parameter.data = twin.data
            freed += parameter.numel() * parameter.element_size()
    return freed


def _name(name: str) -> str:
    return name.removeprefix("lm.")


def _could_share(one: nn.Parameter, two: nn.Parameter) -> bool:
    alike = one.shape == two.shape and one.dtype == two.dtype and one.device == two.device
    return alike and one.device.type != "meta" and one.data_ptr() != two.data_ptr()


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: equal values need not be equal bits (zeros, NaN)."""
    return x.detach().contiguous().view(torch.uint8) if x.dim() else x.detach().reshape(1).view(torch.uint8)
