"""What the exports share: a student as names and tensors, why it does not fit, and the check of what was written.

Letters: G key/value heads, D head dimension, R rows, M model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from linearize.errors import InputError
from linearize.mixers import AttentionShape, MixerConfig
from linearize.modeling.student import LinearizedForCausalLM

CHECK_TOKENS = 24
FP32_TOLERANCE = 1e-4
ROUNDED_TOLERANCE = 0.1


@dataclass(frozen=True, eq=False)
class Source:
    """A student as an export reads it: its parts by layer, and its tensors under the names they have in the teacher.

    `layer_types`: how far each kept layer sees (`full_attention` or `sliding_attention`); of mixer layers, ours.
    """

    family: str
    config: PreTrainedConfig
    plan: list[MixerConfig | None]
    shapes: list[AttentionShape]
    layer_types: list[str]
    state: dict[str, Tensor]
    dtype: torch.dtype

    @staticmethod
    def of(student: LinearizedForCausalLM) -> Source:
        """What a student holds; its tensors are shared, not copied."""
        config = student.lm.config.get_text_config()
        state = {name.removeprefix("lm."): x for name, x in student.state_dict().items()}
        plan = student.config.mixers()
        types = student.config.layer_types or []
        shapes = student.config.attention_shapes()
        return Source(config.model_type, config, plan, shapes, types, state, student.dtype)

    @property
    def kept(self) -> list[int]:
        """Layers with the teacher's own attention."""
        return [i for i, mixer in enumerate(self.plan) if mixer is None]

    def holding(self, name: str) -> list[int]:
        """Layers that hold this mixer."""
        return [i for i, mixer in enumerate(self.plan) if mixer is not None and name_of(mixer) == name]

    def attention(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer's attention module, by their names inside it."""
        return _below(self.state, f"model.layers.{layer}.self_attn.")

    def mixer(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer's mixer, by their names inside it."""
        return _below(self.state, f"model.layers.{layer}.self_attn.mixer.")


def name_of(mixer: MixerConfig) -> str:
    """The name of a mixer in the table `MIXERS`."""
    return str(mixer.name)  # type: ignore[attr-defined]


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def listed(layers: Iterable[int]) -> str:
    """Layers as people write them: `layer 3`, `layers 0, 2`."""
    numbers = [str(i) for i in layers]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def body_misfit(source: Source, target: str, families: Iterable[str]) -> str | None:
    """Why the model around the mixers does not fit, or None. All families have Llama's names for their parts."""
    if source.family not in families:
        return f"{target} takes teachers of the families {', '.join(families)}, not {source.family}"
    if (act := source.config.hidden_act) != "silu":
        return f"{target} has SiLU in its MLP, the teacher {act}"
    if any(name.endswith("_proj.bias") for name in source.state if ".mlp." in name):
        return f"{target} has no biases in its MLP, the teacher has"
    return None


def layer_misfit(source: Source, target: str, mixer: str) -> str | None:
    """Why the layers do not fit, or None: a target takes one kind of mixer, and softmax that sees all the text.

    transformers (5.23) asks a cache's first softmax layer for the number of tokens, so there must be one.
    """
    others: dict[str, list[int]] = {}
    for i, config in enumerate(source.plan):
        if config is not None and name_of(config) != mixer:
            others.setdefault(name_of(config), []).append(i)
    if others:
        layers_text = "; ".join(
            f"{listed(layers)} hold{'s' * (len(layers) == 1)} {name}" for name, layers in others.items()
        )
        return f"{layers_text}, {target} takes {mixer} and softmax"
    if not source.kept:
        return f"no layer keeps softmax, and transformers cannot decode a {target} model without one"
    limited = [i for i in source.kept if source.layer_types[i] != "full_attention"]
    if limited:
        window = getattr(source.config, "sliding_window", None)
        return f"the softmax of {listed(limited)} sees only a window of {window} tokens, that of {target} all the text"
    return None


def repeat_heads(rows: Tensor, dim: int, times: int) -> Tensor:
    """Rows `[G D, ...]` of G heads, each head `times` times in a row: `[G times D, ...]` (grouped-query attention)."""
    return rows.unflatten(0, (-1, dim)).repeat_interleave(times, dim=0).flatten(0, 1)


def body_tensors(source: Source) -> dict[str, Tensor]:
    """Embeddings, norms and head of a Llama-like body, under the names that all such models give them."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for i in range(len(source.plan)):
        names += [f"model.layers.{i}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
    return {name: source.state[name] for name in names}


def body_fields(source: Source) -> dict[str, object]:
    """Fields of a config that Llama-like architectures share."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    )  # fmt: skip
    return {name: getattr(source.config, name) for name in names} | {"use_cache": True}


def rope_fields(source: Source) -> dict[str, object]:
    """The teacher's rotary positions, scaling included."""
    rope = dict(getattr(source.config, "rope_parameters", None) or {})
    return {name: value for name, value in rope.items() if value is not None}


def write_model(target: type[PreTrainedModel], config: PreTrainedConfig, tensors: dict[str, Tensor], source: Source,
                generation: GenerationConfig, folder: Path) -> None:  # fmt: skip
    """Config, weights and generation config of another architecture; every tensor of it must be given, and no other.

    Matrices get the dtype of the student, vectors (decay, step size, biases) keep theirs.
    """
    config.dtype = source.dtype
    with torch.device("meta"):
        model: Any = target(config)
    state = {name: (x.to(source.dtype) if x.dim() > 1 else x).detach().contiguous() for name, x in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    model.save_pretrained(folder)


def logit_difference(student: LinearizedForCausalLM, folder: Path) -> float:
    """Largest difference of the logits of student and written folder on random tokens, over the largest logit.

    Raises:
        InputError: a difference that rounding does not explain: the teacher computes what the target does not.
    """
    embedding: Any = student.get_input_embeddings()
    ids = torch.randint(embedding.weight.shape[0], (1, CHECK_TOKENS), generator=torch.Generator().manual_seed(0)).to(
        student.device
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=student.dtype)
    training = student.training
    with torch.no_grad():
        expected = student.eval()(input_ids=ids, use_cache=False).logits.float()
        logits = loaded.to(student.device).eval()(input_ids=ids, use_cache=False).logits.float()
    student.train(training)
    difference = float((logits - expected).abs().max())
    allowed = FP32_TOLERANCE if student.dtype == torch.float32 else ROUNDED_TOLERANCE
    if not difference <= allowed * max(1.0, float(expected.abs().max())):
        raise InputError(
            f"the exported model's logits differ from the student's by {difference:.2g}: its teacher computes "
            "something that this architecture does not; use --to hf"
        )
    return difference
