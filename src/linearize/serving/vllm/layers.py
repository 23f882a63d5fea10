"""The layers of a student in vLLM: a mixer over pages, and vLLM's own attention where the softmax is kept.

transformers' attention modules reach both through the attention function `vllm_attention`; in the place of a layer
mixer's module stands a `PagedModule`.

Letters: B batch, T tokens, H query heads, G key/value heads, D head dimension, V value dimension, N decoding sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from linearize.errors import InputError
from linearize.mixers import AttentionMixer, AttentionShape, LayerMixer, Mixer
from linearize.modeling.projections import key_projection
from linearize.ops.layout import Layout
from linearize.serving.vllm.backend import StepBackend
from linearize.serving.vllm.pages import PageLayout, StateMemory
from linearize.serving.vllm.steps import Chunk, Decodes, Step

VLLM_ATTENTION = "linearize_vllm"
Run = Callable[..., tuple[Tensor, Any]]
"""`run(*inputs, layout=, state=) -> (y, state)`, of a mixer over the inputs of some tokens."""


class PagedMixer(MambaBase):
    """The mixer of a converted layer, whose state is in vLLM's pages of `page_bytes` bytes."""

    def __init__(self, mixer: Mixer, layout: PageLayout, page_bytes: int, config: VllmConfig, name: str) -> None:
        self.mixer, self.layout, self.page_bytes, self.name = mixer, layout, page_bytes, name
        self.kv_cache = (torch.empty(0, page_bytes, dtype=torch.uint8),)
        self._memory: StateMemory | None = None
        config.compilation_config.static_forward_context[name] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Which of vLLM's kinds of constant states it is."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """One tensor of bytes, of the same size in all layers."""
        return ((self.page_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Bytes."""
        return (torch.uint8,)

    def get_attn_backend(self) -> type[StepBackend]:
        """The backend whose metadata is a `Step`."""
        return StepBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the pages that vLLM gives to this layer."""
        super().bind_kv_cache(kv_cache)
        self._memory = self.layout.memory(self.kv_cache[0])

    def over_step(self, inputs: tuple[Tensor, ...], time_dim: int, run: Run) -> Tensor:
        """y of all tokens of vLLM's step, from inputs with the batch first, of one row of tokens.

        Outside a step (while memory is measured, or the model looked at) all tokens are one sequence.
        """
        step = self._step()
        if step is None or self._memory is None:
            return run(*inputs, layout=Layout(), state=None)[0]
        tokens = inputs[0].shape[time_dim]
        if step.decodes is not None and step.decodes.in_order and len(step.decodes.token_N) == tokens:
            return self._decode(inputs, time_dim, run, step.decodes, self._memory).transpose(0, time_dim)
        y: Tensor | None = None
        for chunk in step.chunks:
            part = self._read(inputs, time_dim, run, chunk, self._memory)
            y = _zeros(part, time_dim, tokens) if y is None else y
            y.narrow(time_dim, chunk.start, chunk.stop - chunk.start).copy_(part)
        if step.decodes is not None:
            taken = tuple(x.index_select(time_dim, step.decodes.token_N) for x in inputs)
            part = self._decode(taken, time_dim, run, step.decodes, self._memory).transpose(0, time_dim)
            y = _zeros(part, time_dim, tokens) if y is None else y
            y.index_copy_(time_dim, step.decodes.token_N, part)
        assert y is not None, "a step without tokens"
        return y

    def _step(self) -> Step | None:
        metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
        if metadata is None:
            return None
        assert isinstance(metadata, dict), "dual batch overlap is refused when the model is made"
        step: Any = metadata[self.name]
        return step

    def _read(self, inputs: tuple[Tensor, ...], time_dim: int, run: Run, chunk: Chunk, memory: StateMemory) -> Tensor:
        """A chunk of one prompt."""
        part = tuple(x.narrow(time_dim, chunk.start, chunk.stop - chunk.start) for x in inputs)
        state = self.mixer.plain(memory.read(chunk.page_1), position=chunk.past) if chunk.past else None
        y, after = run(*part, layout=chunk.layout, state=state)
        memory.write(chunk.page_1, self.mixer.fixed(after))
        return y

    def _decode(
        self, inputs: tuple[Tensor, ...], time_dim: int, run: Run, decodes: Decodes, memory: StateMemory
    ) -> Tensor:
        """One token of each decoding sequence, `[N, ..., 1, ...]`."""
        batched = tuple(x.transpose(0, time_dim) for x in inputs)
        state = memory.read(decodes.page_N) if decodes.pages is None else memory.shared(decodes.pages)
        if decodes.first_N is not None:
            _forget(state, decodes.first_N)
        y, after = run(*batched, layout=decodes.layout, state=state)
        if decodes.pages is not None:
            memory.write_shared(decodes.pages, after)
        elif decodes.first_N is not None:
            memory.write(decodes.page_N, after)
        else:
            self.mixer.put_step(memory.states, decodes.page_N, after)
        return y


def _forget(state: Any, first_N: Tensor) -> None:
    """Zeros in the rows of new sequences, whose pages hold what an earlier one left."""

    def clear(x: Tensor) -> Tensor:
        return x.masked_fill_(first_N.view(-1, *[1] * (x.dim() - 1)), 0)

    state.map_batch(clear)


def _zeros(like: Tensor, dim: int, size: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = size
    return like.new_zeros(shape)


class PagedModule(nn.Module):
    """A layer mixer in transformers' calling convention for attention modules, over pages."""

    def __init__(self, mixer: LayerMixer, paged: PagedMixer) -> None:
        super().__init__()
        self.mixer, self.paged = mixer, paged

    def forward(self, hidden_states: Tensor, *_args: object, **_others: object) -> tuple[Tensor, None]:
        """`hidden_states: [1, T, M]` -> the same; what the teacher's module would take is not used."""
        mixer = self.mixer

        def over_step(projected: tuple[Tensor, ...]) -> Tensor:
            return self.paged.over_step(projected, mixer.time_dim, mixer.mix)

        return mixer(hidden_states, layout=Layout(), cached=over_step)[0], None


class KeptSoftmax:
    """vLLM's attention for a layer that keeps its softmax; `attention` has the keys and values."""

    def __init__(
        self,
        module: nn.Module,
        shape: AttentionShape,
        window: int | None,
        softcap: float | None,
        config: VllmConfig,
        name: str,
    ) -> None:
        """`module`: of transformers. `window`: tokens that it is limited to (None: none).

        Raises:
            InputError: values of another size than the keys.
        """
        if shape.value_dim != shape.head_dim:
            raise InputError(
                f"{name} keeps softmax attention with keys of {shape.head_dim} and values of {shape.value_dim}, "
                "which vLLM's cache has no place for: run this student with linearize generate"
            )
        cache_config = copy.copy(config.cache_config)
        cache_config.sliding_window = None  # of the whole model: `window` says it for the layer
        scale = getattr(module, "scaling", None)
        self.name, self.window, self.softcap = name, window, softcap
        self.scale = float(shape.head_dim**-0.5 if scale is None else scale)
        self.attention = Attention(
            num_heads=shape.num_heads,
            head_size=shape.head_dim,
            scale=self.scale,
            num_kv_heads=shape.num_kv_heads,
            cache_config=cache_config,
            logits_soft_cap=softcap,
            per_layer_sliding_window=window,
            prefix=name,
        )

    def over_step(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTV: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """`[1, T, H, V]` of the tokens of vLLM's step; zeros where there is none (the model is looked at).

        Raises:
            InputError: another window or softcap than this layer was made for.
        """
        (_, heads, tokens, _), width = q_BHTD.shape, v_BGTV.shape[3]
        if not is_forward_context_available():
            return q_BHTD.new_zeros(1, tokens, heads, width)
        asked, made = (window, softcap), (self.window, self.softcap)
        if any(now is not None and now != then for now, then in zip(asked, made, strict=True)):
            raise InputError(f"{self.name} asks for window and softcap {asked}, and was made for {made}")
        q = q_BHTD if scaling == self.scale else q_BHTD * (scaling / self.scale)
        y: Tensor = self.attention(*(x[0].transpose(0, 1).flatten(1) for x in (q, k_BGTD, v_BGTV)))
        return y.view(1, tokens, heads, width)


def vllm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    mixer_hidden: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention in transformers' calling convention, `q: [1, H, T, D]`, `k, v: [1, G, T, .]` -> `[1, T, H, V]`.

    Raises:
        InputError: attention that does more than scores and a window (sinks), in a layer that keeps its softmax.
    """
    served: Any = module.served
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(served, PagedMixer):
        mixer = served.mixer
        assert isinstance(mixer, AttentionMixer)
        keys = () if mixer_hidden is None else (key_projection(module, mixer_hidden, mixer.shape),)

        def run(q_BHTD: Tensor, *inputs: Tensor, layout: Layout, state: Any) -> tuple[Tensor, Any]:
            y_and_state: tuple[Tensor, Any] = mixer(
                q_BHTD, *inputs, layout=layout, state=state, scaling=scale, softcap=softcap
            )
            return y_and_state

        return served.over_step((query, key, value, *keys), mixer.time_dim, run).transpose(1, 2), None
    assert isinstance(served, KeptSoftmax)
    if others.get("s_aux") is not None:
        raise InputError(f"{served.name} has attention sinks, which the plugin does not hand to vLLM")
    return served.over_step(query, key, value, scale, sliding_window, softcap), None


AttentionInterface.register(VLLM_ATTENTION, vllm_attention)
