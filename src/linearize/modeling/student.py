"""The model class of all students, the teacher's own module tree with a plan applied, and the same without a head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.initialization import no_init_weights

from linearize.errors import InputError
from linearize.modeling.attention import AttentionOverride
from linearize.modeling.cache_argument import given_cache, with_cache
from linearize.modeling.config import LinearizeConfig, student_config
from linearize.modeling.forward_call import (
    BackboneHook,
    check_keywords,
    known_keywords,
    positions_to_keep,
    prepare_call,
)
from linearize.modeling.io.adapters import AdapterState, apply_adapters
from linearize.modeling.io.student_folder import valid_generation_config
from linearize.modeling.library_internals import attention_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linearize.mixers import Mixer, MixerConfig
    from linearize.ops.window_linear import Branch


class LinearizedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LM whose planned layers mix the sequence in linear time.

    `lm` is an instance of the teacher's class; layer i's mixer is the submodule `mixer` of its attention module.
    `adapter_state`: what training with adapters left to save.
    """

    config_class = LinearizeConfig
    config: LinearizeConfig
    base_model_prefix = "lm"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = False

    def __init__(self, config: LinearizeConfig, lm: PreTrainedModel | None = None) -> None:
        """A student for a checkpoint to fill, or (`from_teacher`) around an `lm` that holds its mixers already."""
        super().__init__(config)
        if lm is None:
            from linearize.modeling.surgery import install

            attention = attention_of(config)
            lm = AutoModelForCausalLM.from_config(
                config.teacher_config(),
                dtype=torch.get_default_dtype(),
                attn_implementation=None if attention == "sdpa" else attention,
            )
            install(lm, config.mixers(), config.attention, config.attention_shapes(), start=False)
        self.lm = lm
        BackboneHook(config).install(self.base_model)
        self.adapter_state = AdapterState()
        self._keep_in_fp32_modules_strict = self._fp32_names()
        self.post_init()

    @classmethod
    def from_teacher(
        cls, teacher: PreTrainedModel, plan: Sequence[MixerConfig | None], *, teacher_name: str | None = None
    ) -> LinearizedForCausalLM:
        """A student over the teacher's own tensors (no copy): the teacher stays usable, its weights are shared until
        trained apart.

        Raises:
            InputError: a family that cannot be converted, or a plan that does not fit; the teacher is unchanged then.
        """
        from linearize.modeling.probe import probe
        from linearize.modeling.surgery import check_plan, install, share_weights

        sites = probe(teacher)
        checked = check_plan(plan, sites, teacher.config.model_type)
        config = student_config(teacher, sites, checked, teacher_name)
        lm = share_weights(teacher)
        install(lm, checked, config.attention, config.attention_shapes(), start=True)
        with no_init_weights():
            student = cls(config, lm=lm)
        student.generation_config = valid_generation_config(copy.deepcopy(teacher.generation_config))
        return student.eval()

    def convert_layers(self, mixers: Mapping[int, MixerConfig]) -> None:
        """Convert further layers in place; their mixers start from the weights as they are now.

        Raises:
            InputError: a layer that is converted already or does not exist; the student is unchanged then.
        """
        from linearize.modeling.surgery import install

        plan, shapes = self.config.mixers(), self.config.attention_shapes()
        free = [i for i, mixer in enumerate(plan) if mixer is None]
        for layer, mixer in mixers.items():
            if layer not in free:
                raise InputError(f"layer {layer} cannot be converted: layers with softmax attention are {free}")
            plan[layer] = mixer
        install(self.lm, plan, self.config.attention, shapes, start=True, layers=sorted(mixers))
        self.config.set_plan(plan)
        self._keep_in_fp32_modules_strict = set(self._fp32_names())

    def _fp32_names(self) -> list[str]:
        """Names (or their beginnings) of parameters that stay in fp32 whatever the model's dtype."""
        names: list[str] = []
        for layer, mixer in self.mixers().items():
            prefix = f"{self.config.attention[layer]}.mixer"
            own = mixer.fp32_parameters
            names += [prefix] if own is None else [f"{prefix}.{name}" for name in own]
        return names

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        branch: Branch | Mapping[int, Branch] = "both",
        attention_override: AttentionOverride | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the teacher's own forward; `branch` runs one branch of every mixer, or of some layers' (ablation: `{3:
        "window"}`); `attention_override` see `MixerCall`.

        `input_ids: [B, T]`; `attention_mask: [B, past + T]` (padding on one side of the new tokens); packed rows carry
        restarting `position_ids: [B, T]`. `past_key_values` is the older name of `cache`. `kwargs`: what the teacher's
        own forward and transformers know. Returns the teacher class's output (`logits: [B, T, vocabulary]`, `loss` with
        `labels`, and the cache).

        Raises:
            InputError: an argument that nothing would read, no tokens, or a cache or mask of another kind.
        """
        check_keywords(type(self).__name__, kwargs | {"position_ids": position_ids}, known_keywords(self.lm))
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise InputError("give either input_ids or inputs_embeds")
        if not isinstance(branch, str) and (wrong := sorted(set(branch) - set(self._converted()))):
            raise InputError(f"branch of layer {wrong[0]}: layers with a mixer are {self._converted()}")
        call = prepare_call(
            self.config,
            self.lm,
            tokens=tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(cache, past_key_values),
            use_cache=use_cache,
            branch=branch,
            attention_override=attention_override,
        )
        return self.lm(
            input_ids=input_ids,
            attention_mask=call.attention_mask,
            position_ids=call.position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=call.use_cache,
            logits_to_keep=positions_to_keep(logits_to_keep, tokens),
            mixer_call=call.mixer_call,
            **with_cache(self.lm, call.cache),
            **kwargs,
        )

    def mixers(self) -> dict[int, Mixer]:
        """The mixers by layer."""
        mixers: dict[int, Mixer] = {}
        for layer, (name, entry) in enumerate(zip(self.config.attention, self.config.plan, strict=True)):
            if entry is not None:
                mixer: Any = self.lm.get_submodule(name).mixer
                mixers[layer] = mixer
        return mixers

    def mixer_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that the plan added, by name."""
        return {name: p for name, p in self.named_parameters() if ".mixer." in name}

    def set_store(self, pairs: int) -> None:
        """See `exact_memory.set_store`."""
        from linearize.modeling.exact_memory import set_store

        set_store(self, pairs)

    def keep_heads(self, groups: Mapping[int, Sequence[int]]) -> None:
        """See `exact_memory.keep_heads`."""
        from linearize.modeling.exact_memory import keep_heads

        keep_heads(self, groups)

    def push_to_hub(  # type: ignore[override]  # the parent knows neither tokenizer nor card
        self,
        repo_id: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a student of linearize",
    ) -> str:
        """See `upload.push_student`: with the tokenizer, and the card, recipe and report of its folder."""
        from linearize.modeling.io.upload import push_student

        return push_student(
            self, repo_id, tokenizer=tokenizer, private=private, token=token, revision=revision, message=commit_message
        )

    def _converted(self) -> list[int]:
        """The layers that hold a mixer."""
        return [layer for layer, entry in enumerate(self.config.plan) if entry is not None]

    @property
    def base_model(self) -> nn.Module:
        """The teacher's backbone, whose output is `last_hidden_state: [B, T, M]`; mixers included."""
        backbone: nn.Module = self.lm.base_model
        return backbone

    @property
    def model(self) -> nn.Module:
        """The backbone under the name that most families give it."""
        return self.base_model

    def get_input_embeddings(self) -> nn.Module:
        """The teacher's."""
        return self.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The teacher's."""
        self.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The teacher's."""
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """The teacher's."""
        self.lm.set_output_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As the teacher's class does it, with all that says the vocabulary's size; the teacher keeps its own."""
        for part in (self.get_input_embeddings(), self.get_output_embeddings()):
            for name, shared in () if part is None else part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(shared.data, requires_grad=shared.requires_grad))
        embeddings: nn.Embedding = self.lm.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            self.vocab_size = self.lm.config.get_text_config().vocab_size
            self.config.set_vocab_size(self.vocab_size)
        return embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Mixers start themselves when built; on the way from a checkpoint every tensor is read (`from_pretrained` is
        strict)."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a student; safetensors only, and strictly: every tensor of the plan must be there and no other.

        Raises:
            InputError: weights that do not fit the plan.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        wrong = {k: sorted(info[k])[:3] for k in ("missing_keys", "unexpected_keys") if info.get(k)}
        if wrong:
            differences = "; ".join(f"{k.split('_')[0]}: {', '.join(map(str, names))}" for k, names in wrong.items())
            raise InputError(
                f"the weights in {Path(str(pretrained_model_name_or_path)).name} do not fit its plan ({differences})"
            )
        apply_adapters(model, pretrained_model_name_or_path)
        return (model, info) if wants_info else model


class LinearizedModel(LinearizedForCausalLM):
    """The whole student, its head included (so that saving it loses nothing), whose forward ends before the head."""

    @classmethod
    def can_generate(cls) -> bool:
        """No: there are no logits."""
        return False

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the teacher's own backbone; returns its output (`last_hidden_state: [B, T, M]`, and the cache).

        Arguments as those of `LinearizedForCausalLM.forward`. Raises InputError: an argument that nothing would read.
        """
        backbone = self.base_model
        return backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **with_cache(backbone, given_cache(cache, past_key_values)),
            **kwargs,
        )
