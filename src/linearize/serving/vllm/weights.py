"""A student's checkpoint, as vLLM reads it, into a student whose memory is there already."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from linearize.errors import InputError
from linearize.modeling.io.adapters import apply_adapters
from linearize.modeling.library_internals import checkpoint_renamer, load_converted
from linearize.modeling.student import LinearizedForCausalLM


@torch.no_grad()
def load_into(student: LinearizedForCausalLM, weights: Iterable[tuple[str, Tensor]], folder: str) -> None:
    """Fill a student with the tensors of its folder, in its own dtypes, and add adapters that lie there.

    Raises:
        InputError: tensors that do not fit the plan.
    """
    state: dict[str, Tensor] = student.state_dict()
    rename = checkpoint_renamer(student, state)
    loaded, unexpected, converted, made = set[str](), list[str](), dict[str, Tensor](), set[str]()
    for key, tensor in weights:
        name, pattern = rename(key)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            unexpected.append(key)
        elif pattern is not None:
            converted[key] = tensor
            made.add(name.rpartition(".")[0])
        elif state[name].shape != tensor.shape:
            raise InputError(
                f"the weights in {folder} do not fit its plan: {key} is {list(tensor.shape)}, not "
                f"{list(state[name].shape)}"
            )
        else:
            state[name].copy_(tensor)
            loaded.add(name)
    if converted:
        load_converted(student, converted, student.dtype)
    tied = set(getattr(student, "all_tied_weights_keys", None) or ())
    missing = [name for name in state if name not in loaded | tied and name.rpartition(".")[0] not in made]
    if missing or unexpected:
        differences = {"missing": sorted(missing)[:3], "unexpected": sorted(unexpected)[:3]}
        shown = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names)
        raise InputError(f"the weights in {folder} do not fit its plan ({shown})")
    apply_adapters(student, folder)
