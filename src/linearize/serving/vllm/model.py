"""The model class that vLLM makes of a student's folder: the student itself, its attention over vLLM's caches.

Projections, norms and MLPs are the teacher's own modules of transformers, so every family that converts is served.

Letters: T tokens of a step, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.sequence import IntermediateTensors

from linearize.errors import InputError
from linearize.mixers import LayerMixer
from linearize.modeling import LinearizeConfig, LinearizedForCausalLM
from linearize.modeling.forward_call import BackboneHook
from linearize.modeling.library_internals import remove_pre_hooks, set_attention
from linearize.modeling.prepacked_linear import packed_projections
from linearize.modeling.probe import attention_configs
from linearize.serving.vllm.checks import student_config, student_layouts
from linearize.serving.vllm.layers import VLLM_ATTENTION, KeptSoftmax, PagedMixer, PagedModule
from linearize.serving.vllm.pages import PageLayout, page_bytes
from linearize.serving.vllm.weights import load_into
from linearize.training.stages.chunked_logits import SplitModel


class ServedStudent(nn.Module, HasInnerState, IsHybrid):
    """A student in vLLM; `is_hybrid` also where no layer keeps its softmax: then all pages are of one kind."""

    has_inner_state: ClassVar[Literal[True]] = True
    is_hybrid: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """A student for `load_weights` to fill.

        Raises:
            InputError: a layer that this plugin does not run; says which.
        """
        super().__init__()
        self.config, self.folder = student_config(vllm_config), str(vllm_config.model_config.model)
        layouts = student_layouts(vllm_config)
        with no_init_weights():
            self.student = LinearizedForCausalLM(self.config).eval()
        self.student.tie_weights()  # left out with the initialisation
        self.student.requires_grad_(False)
        for name, parameter in self.student.named_parameters():  # vLLM makes all of a model in one dtype
            if any(fragment in name for fragment in self.student._keep_in_fp32_modules_strict or ()):
                parameter.data = parameter.data.float()
        self.kept = nn.ModuleList()
        self._serve(layouts, vllm_config, prefix)
        self._split: SplitModel | None = None
        self._packed = ExitStack()
        decoder: nn.Module = self.student.lm.get_decoder()
        self._decoder = [decoder]  # in a list: it is in the tree already

    def _serve(self, layouts: Mapping[int, PageLayout], vllm_config: VllmConfig, prefix: str) -> None:
        """Put the layers of `layers.py` where attention is computed."""
        lm, config, size = self.student.lm, self.config, page_bytes(list(layouts.values()))
        mixers = self.student.mixers()
        for layer, (name, shape) in enumerate(zip(config.attention, config.attention_shapes(), strict=True)):
            module: Any = lm.get_submodule(name)
            full_name = f"{prefix}.{name}" if prefix else name
            if layer not in layouts:
                softcap = getattr(config, "attn_logit_softcapping", None)
                window = window_of(config, layer)
                module.served = KeptSoftmax(module, shape, window, softcap, vllm_config, f"{full_name}.attn")
                self.kept.append(module.served.attention)  # where vLLM looks for it: not among the student's weights
                continue
            mixer = mixers[layer]
            paged = PagedMixer(mixer, layouts[layer], size, vllm_config, f"{full_name}.mixer")
            if isinstance(mixer, LayerMixer):
                lm.set_submodule(name, PagedModule(mixer, paged))
            else:
                module.served = paged
        for module_config in attention_configs(lm):
            set_attention(module_config, VLLM_ATTENTION)
        remove_pre_hooks(self.student.base_model, BackboneHook)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """See `PagedMixer.get_state_shape`."""
        return ((page_bytes(list(student_layouts(vllm_config).values())),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """See `PagedMixer.get_state_dtype`."""
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        """How vLLM copies a state (prefix caching): the whole page."""
        return (get_temporal_copy_spec,)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings `[T, M]`."""
        embedded: Tensor = self.student.get_input_embeddings()(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states `[T, M]` of a step's tokens."""
        tokens = {"input_ids": input_ids[None]} if inputs_embeds is None and input_ids is not None else {}
        if inputs_embeds is not None:
            tokens = {"inputs_embeds": inputs_embeds[None]}
        out = self._decoder[0](**tokens, position_ids=positions[None], use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits `[T, V]`, by the family's own way from hidden states.

        Raises:
            InputError: a family whose head cannot be run by itself.
        """
        if self._split is None:
            self._split = SplitModel(self.student)
            if self._split.decoder is None:
                raise InputError(
                    f"{self.config.teacher['model_type']}: logits do not follow from its final hidden states alone, "
                    "as vLLM asks: run this student with linearize generate"
                )
        return self._split.logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the student; gives the names of all parameters.

        Raises:
            InputError: tensors that do not fit the plan.
        """
        self._packed.close()
        load_into(self.student, weights, self.folder)
        self._packed.enter_context(
            packed_projections(self.student, twice=True)
        )  # as vLLM packs its own models' on CPUs
        return {name for name, _ in self.named_parameters()}


def window_of(config: LinearizeConfig, layer: int) -> int | None:
    """Tokens that a kept softmax layer is limited to, as the teacher's config says."""
    types = config.layer_types
    return config.sliding_window if types is not None and types[layer] == "sliding_attention" else None
