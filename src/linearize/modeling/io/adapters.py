"""LoRA adapters of a student after training: kept next to its weights, or added to weights that are quantized.

Letters: O outputs, I inputs of a linear layer, R rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from linearize.errors import InputError

if TYPE_CHECKING:
    from peft import PeftConfig

FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """What the weight of a linear layer gained: `scale * b_OR @ a_RI`."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float

    def added_to(self, weight_OI: Tensor) -> Tensor:
        """Return a weight with the change."""
        change_OI = self.scale * (self.b_OR.float() @ self.a_RI.float())
        return weight_OI + change_OI.to(weight_OI.device, weight_OI.dtype)


@dataclass(frozen=True, eq=False)
class KeptAdapters:
    """Adapters whose product is in a student's weights in memory, and that are saved next to the weights on disk.

    `config`: peft's `LoraConfig`. `state`: tensors by peft's names. `weights`: those of the adapted layers, without the
    product.
    """

    config: PeftConfig
    state: dict[str, Tensor]
    weights: dict[str, nn.Parameter]


@dataclass(frozen=True, eq=False)
class AdapterState:
    """What training with adapters left to save of a student.

    `kept`: adapters to save next to the weights. `changes`: changes of layers whose base weights are quantized, by
    name; the saved student adds them to the teacher's own weights.
    """

    kept: KeptAdapters | None = None
    changes: Mapping[str, tuple[LowRankChange, ...]] = field(default_factory=dict)

    def with_changes(self, changes: Mapping[str, LowRankChange]) -> AdapterState:
        """The same with one more change of each of these layers."""
        added = {name: (*self.changes.get(name, ()), change) for name, change in changes.items()}
        return replace(self, changes={**self.changes, **added})


def kept_adapters(model: nn.Module) -> KeptAdapters | None:
    """Return the adapters to save next to a student's weights; None for any other model."""
    state = getattr(model, "adapter_state", None)
    return state.kept if isinstance(state, AdapterState) else None


@contextmanager
def without_product(student: nn.Module, kept: KeptAdapters | None) -> Iterator[None]:
    """Give adapted layers their weights without the adapters' product inside the `with` block."""
    bare: Mapping[str, nn.Parameter] = {} if kept is None else kept.weights
    merged = {name: student.get_parameter(f"{name}.weight") for name in bare}
    try:
        for name, weight in bare.items():
            student.get_submodule(name).register_parameter("weight", weight)
        yield
    finally:
        for name, weight in merged.items():
            student.get_submodule(name).register_parameter("weight", weight)


def save_adapters(kept: KeptAdapters, folder: Path) -> None:
    """Write adapters in peft's format into a student's folder."""
    from safetensors.torch import save_file

    (folder / FOLDER).mkdir()
    kept.config.save_pretrained(str(folder / FOLDER))
    save_file({k: v.cpu() for k, v in kept.state.items()}, folder / FOLDER / WEIGHTS, {"format": "pt"})


def apply_adapters(student: nn.Module, path: str | os.PathLike[str]) -> None:
    """Add the product of the adapters in `path/adapter`, if there are any, to the student's weights in memory.

    Raises:
        InputError: adapters that do not fit the student, or weights that are offloaded.
    """
    folder = Path(str(path)) / FOLDER
    if not folder.is_dir():
        return
    from peft import LoraConfig
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(str(folder))
    state = load_file(folder / WEIGHTS)
    scale = config.lora_alpha / config.r
    modules = dict(student.named_modules())
    for name in sorted({key.rpartition(".lora_")[0] for key in state}):
        module = modules.get(name.removeprefix("base_model.model."))
        a, b = state.get(f"{name}.lora_A.weight"), state.get(f"{name}.lora_B.weight")
        if not isinstance(module, nn.Linear) or a is None or b is None:
            raise InputError(f"the adapters in {folder} do not fit the student: {name} is no linear layer of it")
        if module.weight.is_meta:
            raise InputError(
                f"the adapters in {folder} are added to weights in memory, and those of {name} are offloaded: load the "
                "student without offload, save it, and load that"
            )
        with torch.no_grad():
            module.weight += scale * (b.float() @ a.float()).to(module.weight.dtype).to(module.weight.device)
