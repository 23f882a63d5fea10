"""Teachers that give no numbers: found before anything is trained, and not blamed on the training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import InputError
from linearize.modeling.io.quantized import whole_weight

PROBE_TOKENS = 32


def check_finite_weights(model: nn.Module, name: str) -> None:
    """Look at every weight of a teacher. Raises InputError: one holds a value that is no number; names it."""
    if wrong := [key for key, weight in model.named_parameters() if not is_finite(whole_weight(weight))]:
        raise not_numbers(name, wrong[0], len(wrong))


def not_numbers(name: str, weight: str, count: int = 1) -> InputError:
    """The refusal of weights with NaN or infinity in them."""
    return InputError(
        f"the teacher {name} itself gives NaN: its weight {weight} holds values that are no numbers ({count} such "
        "weights): its files are damaged, or it diverged in training; give another one"
    )


@torch.no_grad()
def check_finite_outputs(model: Any, name: str, ids_BT: Tensor | None = None) -> None:
    """Run a teacher on tokens (None: some from all over its vocabulary) and see that its logits are numbers.

    Raises:
        InputError: they are not, although its weights are; says in which type the numbers overflow.
    """
    if ids_BT is None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROBE_TOKENS
        ids_BT = torch.linspace(0, vocabulary - 1, min(PROBE_TOKENS, context)).long()[None]
    logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
    if not (logits_BTV.isnan() | logits_BTV.isposinf()).any():  # -inf: a token that is ruled out
        return
    raise InputError(
        f"the teacher {name} itself gives NaN, though all its weights are numbers: they overflow in "
        f"{str(model.dtype).removeprefix('torch.')}; save it in float32 or bfloat16 (dtype in config.json) first"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:  # those of 8 bits are codes that need a scale
        return True
    return bool(tensor.isfinite().all())
