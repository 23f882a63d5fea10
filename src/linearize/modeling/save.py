"""Writing a student's folder, and the LoRA adapters that a recipe may keep beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.errors import InputError

ADAPTER = "adapter"


def save_student(student: Any, tokenizer: Any, folder: Path) -> None:
    """Config, weights (safetensors), generation config and tokenizer; adapters that were not merged go to
    `adapter/`."""
    kept = student.__dict__.pop("kept_adapters", None)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kept is not None:
        from safetensors.torch import save_file

        config, state = kept
        (folder / ADAPTER).mkdir()
        config.save_pretrained(folder / ADAPTER)
        save_file(
            {k: v.cpu() for k, v in state.items()}, folder / ADAPTER / "adapter_model.safetensors", {"format": "pt"}
        )


def apply_adapters(student: Any, path: Any) -> None:
    """Add the product of the adapters in `path/adapter`, if there are any, to the student's weights in memory.

    Raises:
        InputError: adapters that do not fit the student.
    """
    folder = Path(str(path)) / ADAPTER
    if not folder.is_dir():
        return
    from peft import LoraConfig
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(str(folder))
    state = load_file(folder / "adapter_model.safetensors")
    scale = config.lora_alpha / config.r
    modules = dict(student.named_modules())
    for name in sorted({key.rpartition(".lora_")[0] for key in state}):
        module = modules.get(name.removeprefix("base_model.model."))
        a, b = state.get(f"{name}.lora_A.weight"), state.get(f"{name}.lora_B.weight")
        if not isinstance(module, nn.Linear) or a is None or b is None:
            raise InputError(f"the adapters in {folder} do not fit the student: {name} is no linear layer of it")
        with torch.no_grad():
            module.weight += scale * (b.float() @ a.float()).to(module.weight.dtype).to(module.weight.device)
