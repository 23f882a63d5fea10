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
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    store: int | None = None,
) -> LinearizedForCausalLM:
    """A student from its folder (or Hub name), in eval mode.

    Args:
        path: the student; with `adapter` its teacher.
        adapter: what the student is to its teacher; the folder of an adapter by itself, given as `path`, takes the
            teacher that it was made with.
        revision, token: of a Hub name, a branch, tag or commit, and what to read with (None: HF_TOKEN).
        dtype: None: that of the checkpoint.
        device_map: as transformers takes it, in the place of `device` (None: the CPU).
        attn_implementation: of the kept softmax layers.
        store: pairs that each key/value head of window + linear mixers keeps exact (None: as the student was made; it
            needs no training).

    Raises:
        InputError: a missing folder, a model that is no student, weights that do not fit the plan, or a store for
            mixers that have none.
    """
    from linearize.modeling.io.hub import local_copy
    from linearize.modeling.io.teacher import check_device_map

    check_device_map(device, device_map)
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    options |= {"attn_implementation": attn_implementation} if attn_implementation else {}
    place = local_copy(path, revision=revision, token=token)
    if adapter is not None:
        adapter = local_copy(adapter, token=token).path
    student = _load(place.path, adapter=adapter, dtype=dtype, device=device, options=options)
    if store is not None:
        student.set_store(store)
    return student


def _load(
    path: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None,
    dtype: torch.dtype | str | None,
    device: str | torch.device | None,
    options: dict[str, Any],
) -> LinearizedForCausalLM:
    from linearize.modeling.io.adapter_folder import is_adapter_folder, load_adapter
    from linearize.modeling.io.model_source import find_model

    if adapter is not None or is_adapter_folder(path):
        folder, teacher = (path, None) if adapter is None else (adapter, path)
        return load_adapter(folder, teacher, dtype=dtype, device=device, **options)
    source = find_model(path)
    if source.gguf_file is not None:
        raise InputError(f"{source} is a GGUF file, not a student: load it with transformers")
    path = source.name
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
    placed: Any = model if "device_map" in options else model.to(device or "cpu")  # type: ignore[arg-type]
    student: LinearizedForCausalLM = placed.eval()
    return student
