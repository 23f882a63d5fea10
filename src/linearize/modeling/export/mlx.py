"""Students as folders for mlx-lm: weights under Llama's names, and one file of code that `model_file` names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from linearize.mixers import MixerConfig
from linearize.mixers.lolcats import LolcatsConfig
from linearize.mixers.sliding_window import SlidingWindowConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.export.common import Source, body_fields, body_misfit, listed, name_of, rope_fields

TARGET = "mlx"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MODEL_FILE = "linearized_mlx.py"
CODE = Path(__file__).parent / "mlx_files" / MODEL_FILE
SCALED = ("linear", "llama3", "yarn")  # rotary positions that mlx-lm has under the same fields


def misfit(source: Source) -> str | None:
    """Why a student cannot be written for mlx-lm, or None."""
    if reason := body_misfit(source, TARGET, FAMILIES):
        return reason
    for i, mixer in enumerate(source.plan):
        if mixer is None:
            if source.layer_types[i] != "full_attention":
                return f"the softmax of {listed([i])} sees only a window, that of {TARGET} all the text"
            continue
        if not isinstance(mixer, LolcatsConfig | SlidingWindowConfig):
            return f"{listed([i])} holds {name_of(mixer)}, {TARGET} takes lolcats, sliding_window and softmax"
        if mixer.window_shape != "terraced" or not mixer.window:
            return (
                f"the window of {listed([i])} is {mixer.window_shape} of {mixer.window}, {TARGET} takes terraced ones"
            )
        if getattr(mixer, "store", 0):
            return f"{listed([i])} has an exact store, which {TARGET} has not: load the student with store=0"
    rope = rope_fields(source)
    if rope.get("rope_type", "default") not in ("default", *SCALED) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"{TARGET} does not have the teacher's rotary positions ({rope.get('rope_type')})"
    return None


def write(student: LinearizedForCausalLM, source: Source, folder: Path) -> None:
    """Config, weights and code; biases and norms of queries and keys are found in the weights."""
    (folder / "config.json").write_text(json.dumps(config_fields(source), indent=2, sort_keys=True) + "\n", "utf-8")
    save_file(tensors(source), folder / "model.safetensors", {"format": "pt"})
    shutil.copy(CODE, folder / MODEL_FILE)
    if student.generation_config is not None:
        student.generation_config.save_pretrained(folder)


def config_fields(source: Source) -> dict[str, Any]:
    """What `ModelArgs` of the code reads, and `model_type` as the tokenizer's loader knows it."""
    rope, first = rope_fields(source), source.attention(0)
    scaled = rope.get("rope_type", "default") != "default"
    return body_fields(source) | {
        "model_type": source.family,
        "model_file": MODEL_FILE,
        "head_dim": source.shapes[0].head_dim,
        "rope_theta": rope.get("rope_theta", 10_000.0),
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        "attention_bias": "q_proj.bias" in first,
        "output_bias": "o_proj.bias" in first,
        "query_key_norm": "q_norm.weight" in first,
        "dtype": str(source.dtype).removeprefix("torch."),
        "linearize_layers": [None if mixer is None else _options(mixer) for mixer in source.plan],
    }


def _options(mixer: MixerConfig) -> dict[str, Any]:
    """What the code's `WindowMixer` reads."""
    assert isinstance(mixer, LolcatsConfig | SlidingWindowConfig)
    options: dict[str, Any] = {"window": mixer.window, "num_sinks": mixer.num_sinks}
    if isinstance(mixer, SlidingWindowConfig):
        return options | {"feature_map": None, "feature_dim": 0, "affine": False, "shift": "window"}
    names = ("feature_map", "feature_dim", "affine", "shift")
    return options | {name: getattr(mixer, name) for name in names}


def tensors(source: Source) -> dict[str, Tensor]:
    """The student's own, a tied head left out; matrices in its dtype, mixers as they are."""
    tied = bool(source.config.tie_word_embeddings)
    kept = {name: x for name, x in source.state.items() if not (tied and name == "lm_head.weight")}
    return {
        name: (x if ".mixer." in name else x.to(source.dtype)).detach().cpu().contiguous() for name, x in kept.items()
    }
