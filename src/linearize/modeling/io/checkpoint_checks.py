"""Whether a checkpoint is what its model needs: no tensor missing or unread, numbers of a known scale, no NaN.

Faults of a teacher are found before anything is trained, and are not blamed on the training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from linearize.errors import InputError
from linearize.modeling.io.quantized import whole_weight

_WHOLE_NUMBERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_SCALES = re.compile(r"(_scale|_scales|_scale_inv|_scale_2|_zero_point|\.absmax|\.quant_map|\.SCB|\.scales|\.qzeros)$")
_HARMLESS = (
    re.compile(r"(^|\.)mtp\."),  # layers that predict further tokens: plain decoding does without
    re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$"),  # computed from the config
    re.compile(r"\.(attn|attention)\.(bias|masked_bias)$"),  # the causal mask that GPT-2 and its kin saved
    re.compile(r"(^|\.)position_ids$"),  # 0, 1, 2, ...
    # of images and sounds, which text does not pass through
    re.compile(r"^(model\.)?(vision_\w+|visual|audio_tower|multi_modal_projector|embed_vision|embed_audio)\."),
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
PROBE_TOKENS = 32


def check_numbers(name: str, types: Mapping[str, str], config: PreTrainedConfig) -> None:
    """Refuse weights in 8 bits and fewer that nothing says how to scale; they would be read as noise.

    Args:
        types: of each tensor in the files, as safetensors names them (`BF16`, `F8_E4M3`).
    """
    if getattr(config, "quantization_config", None):
        return
    scaled = [key for key, kind in types.items() if kind.startswith(("F8", "F6", "F4"))]
    scaled += [key for key, kind in types.items() if kind in _WHOLE_NUMBERS and key.endswith(".weight")]
    if not scaled:
        return
    scales = [key for key in types if _SCALES.search(key)]
    beside = f"scales beside them ({scales[0]})" if scales else "no scales beside them"
    raise InputError(
        f"{name} holds weights in {types[scaled[0]]} ({scaled[0]}; {len(scaled)} such tensors), {beside}, and its "
        "config.json has no quantization_config that says how to read them: save the weights in bfloat16, or add the "
        "quantization_config that they were made with"
    )


def check_keys(
    name: str, config: PreTrainedConfig, *, missing: Iterable[str], unexpected: Iterable[str], prefix: str = "model"
) -> None:
    """Refuse a checkpoint that lacks tensors of its model, or has others that nothing reads and that may matter.

    Args:
        missing, unexpected: tensors as the model and as the files name them. prefix: the model's `base_model_prefix`.

    Raises:
        InputError: names a tensor; where another program put something into the names, what, and how to take it out.
    """
    lacking, left = sorted(missing), sorted(key for key in unexpected if not _is_harmless(key, config))
    if lacking and (inserted := _inserted(lacking, left, prefix)):
        program = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{name}', dtype='auto', key_mapping={{r'{re.escape(inserted)}': ''}})"
            ".save_pretrained('FIXED', save_original_format=False)"
        )
        raise InputError(
            f"{name} holds the weights under other names: {left[0]} has {inserted!r} in it, which a wrapper "
            f'(torch.compile, DataParallel, FSDP) adds; take it out: python -c "{program}"'
        )
    if lacking:
        raise InputError(
            f"{name} lacks weights of a {config.model_type} model ({lacking[0]}; {len(lacking)} missing): "
            "copy or download the folder again"
        )
    if left:
        scales = [key for key in left if _SCALES.search(key)]
        what = "scales of quantized weights that its config.json says nothing of" if scales else "tensors"
        raise InputError(
            f"{name} holds {len(left)} {what} that a {config.model_type} model does not read "
            f"({(scales or left)[0]}), so its weights or its config.json are not what they seem: save the model again "
            "with the program that made it, or leave these tensors out of the file if they are not needed"
        )


def _is_harmless(key: str, config: PreTrainedConfig) -> bool:
    """Whether a model computes the same without this tensor."""
    if any(pattern.search(key) for pattern in _HARMLESS):
        return True
    text = config.get_text_config()
    further = getattr(text, "num_nextn_predict_layers", None) or 0  # they follow the layers, in the same list
    layer = _LAYER.search(key)
    count = getattr(text, "num_hidden_layers", 0)
    return layer is not None and count <= int(layer.group(1)) < count + further


def _inserted(missing: Iterable[str], unexpected: Iterable[str], prefix: str) -> str | None:
    """What the names of a file have in them that the model's have not, as `module.`; None: that is not it."""
    expected = set(missing)
    expected |= {key.removeprefix(f"{prefix}.") for key in expected}
    for key in unexpected:
        parts = key.split(".")
        for first in range(len(parts) - 1):
            for last in range(first + 1, len(parts)):
                if ".".join(parts[:first] + parts[last:]) in expected:
                    return ".".join(parts[first:last]) + "."
    return None


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
