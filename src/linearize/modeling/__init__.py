"""Students as transformers models: config, model class, surgery, cache layers, loading and saving."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from linearize.errors import InputError, one_line
from linearize.modeling.config import LinearizeConfig
from linearize.modeling.student import LinearizedForCausalLM, LinearizedModel

if TYPE_CHECKING:
    import torch

__all__ = ["LinearizeConfig", "LinearizedForCausalLM", "load"]

AutoConfig.register(LinearizeConfig.model_type, LinearizeConfig)
AutoModel.register(LinearizeConfig, LinearizedModel)
AutoModelForCausalLM.register(LinearizeConfig, LinearizedForCausalLM)


def load(
    path: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    store: int | None = None,
) -> LinearizedForCausalLM:
    """A student from its folder (or Hub name), in eval mode.

    With `adapter`, `path` is the teacher, and the student is what the adapter makes of it; the folder of an adapter by
    itself takes the teacher that it was made with. `attn_implementation` is that of the kept softmax layers. `dtype`:
    default is that of the checkpoint. `store`: pairs that each key/value head of window + linear mixers keeps exact
    (None: as the student was made; it needs no training).

    Raises:
        InputError: a missing folder, a model that is no student, weights that do not fit the plan, or a store for
            mixers that have none.
    """
    student = _load(path, adapter=adapter, dtype=dtype, device=device, attn_implementation=attn_implementation)
    if store is not None:
        student.set_store(store)
    return student


def _load(
    path: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None,
    dtype: torch.dtype | str | None,
    device: str | torch.device | None,
    attn_implementation: str | None,
) -> LinearizedForCausalLM:
    from linearize.modeling.io.adapter_folder import is_adapter_folder, load_adapter
    from linearize.modeling.io.model_source import find_model

    if adapter is not None or is_adapter_folder(path):
        folder, teacher = (path, None) if adapter is None else (adapter, path)
        return load_adapter(folder, teacher, dtype=dtype, device=device, attn_implementation=attn_implementation)
    source = find_model(path)
    if source.gguf_file is not None:
        raise InputError(f"{source} is a GGUF file, not a student: load it with transformers")
    path = source.name
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        config = AutoConfig.from_pretrained(path)
        if not isinstance(config, LinearizeConfig):
            raise InputError(f"{path} is a {config.model_type} model, not a student: load it with transformers")
        config.mixers()
        model: LinearizedForCausalLM = LinearizedForCausalLM.from_pretrained(path, dtype=dtype or "auto", **options)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"cannot load {path} as a student: {one_line(error)}") from error
    placed: Any = model.to(device or "cpu")  # type: ignore[arg-type]
    student: LinearizedForCausalLM = placed.eval()
    return student
