"""How transformers calls mixers: as the attention function between projections, or in place of the attention module."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.utils import TransformersKwargs

from linearize.errors import InputError
from linearize.modeling.cache import DecodingRun, MixerCacheLayer, Pending, Run, RunOptions
from linearize.modeling.projections import key_projection
from linearize.modeling.static.cache import Place, StaticMixerLayer
from linearize.ops.layout import Layout

if TYPE_CHECKING:
    from linearize.mixers import LayerMixer
    from linearize.mixers.base import Mixer, MixerState
    from linearize.ops.window_linear import Branch


ATTENTION = "linearize"
# Tensors that every attention function is handed: the call's layout says what they say, or the loss reads them
READ_ELSEWHERE = frozenset(
    {"position_ids", "cache_position", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"}
)
NEVER_IGNORED = (Tensor, Cache)
COMMON = frozenset(TransformersKwargs.__annotations__) | {"return_dict", "mixer_call", "linearize_probe_calls"}
"""Keywords that transformers hands through every forward, and ours."""
AttentionOverride = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class MixerCall:
    """The arguments of one forward pass that all mixers of the student read.

    `attention_override`: called instead of the mixer in every converted layer, as `attention_override(module, q, k, v,
    scaling=, softcap=, sliding_window=, layout=) -> y [B, H, T, V]`; attention transfer uses it to compute both
    attentions and pass the teacher's on. `branch`: what every mixer runs, or by layer (layers not named run both).
    `place`: of the new tokens in a static cache; None everywhere else, and while such a cache reads its prompts.
    """

    layout: Layout
    cache: Cache | None = None
    branch: Branch | Mapping[int, Branch] = "both"
    attention_override: AttentionOverride | None = None
    place: Place | None = None

    def branch_of(self, layer_idx: int) -> Branch:
        """What the mixer of this layer runs."""
        return self.branch if isinstance(self.branch, str) else self.branch.get(layer_idx, "both")


@functools.cache
def parameter_names(forward: Callable[..., object]) -> tuple[str, ...]:
    """Names of the parameters after `self`, without `*args` and `**kwargs`."""
    named: Iterable[inspect.Parameter] = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def require_call(mixer_call: MixerCall | None, module: nn.Module) -> MixerCall:
    """What the pass tells the mixers.

    Raises:
        InputError: a layer that was called by itself, where documents, padding and state are unknown.
    """
    if mixer_call is None:
        raise InputError(
            f"layer {module.layer_idx} was called by itself: call the student, or its backbone (student.base_model), "
            "which say where documents and padding are"
        )
    return mixer_call


def refuse_unread(module: nn.Module, arguments: Mapping[str, object], known: Collection[str] = ()) -> None:
    """Refuse tensors and caches that reach a converted layer under names that nothing reads there.

    Raises:
        InputError: one that is neither `known` nor handed through every forward.
    """
    for name, value in arguments.items():
        if isinstance(value, NEVER_IGNORED) and name not in known and name not in READ_ELSEWHERE:
            raise InputError(f"{name} reached layer {module.layer_idx}, whose mixer does not read it: leave it out")


def mixer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    mixer_call: MixerCall | None = None,
    mixer_hidden: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention through the layer's mixer, in transformers' calling convention.

    `query: [B, H, T, D]`, `key`, `value: [B, G, T, D]` after RoPE and norms -> `[B, T, H, V]`. `mixer_hidden:
    [B, T, M]`: the attention module's input, where the mixer asks for the key projection's output.

    Raises:
        InputError: a call that did not come through the backbone, or with a tensor that no mixer would read.
    """
    mixer_call = require_call(mixer_call, module)
    refuse_unread(module, others)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if mixer_call.attention_override is not None:
        named: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sliding_window": sliding_window}
        y_BHTV = mixer_call.attention_override(module, query, key, value, layout=mixer_call.layout, **named)
        return y_BHTV.transpose(1, 2), None
    mixer: Any = module.mixer
    inputs: tuple[Tensor, ...] = (key, value)
    if mixer_hidden is not None:
        inputs = (key, value, key_projection(module, mixer_hidden, mixer.shape))
    branch = mixer_call.branch_of(module.layer_idx)  # type: ignore[arg-type]
    run = DecodingRun(mixer, query, branch, scaling, softcap)
    y_BHTV = through_cache(mixer_call, module.layer_idx, mixer, inputs, run)  # type: ignore[arg-type]
    return y_BHTV.transpose(1, 2), None


def through_cache(call: MixerCall, layer_idx: int, mixer: Mixer, inputs: tuple[Tensor, ...], run: Run) -> Tensor:
    """Run a mixer over new tokens, with the state of its cache layer where there is a cache."""
    if call.cache is None:
        raw, everything = Pending(inputs, mixer.time_dim, call.layout), slice(None)
        return run(raw, state=None, commit=None, need_state=False, outputs=everything)[0]
    layer = call.cache.layers[layer_idx]
    if isinstance(layer, StaticMixerLayer):
        return layer.step(mixer, inputs, run, layout=call.layout, place=call.place)
    assert isinstance(layer, MixerCacheLayer)
    layer.enter(call)
    return layer.step(mixer, inputs, run, layout=call.layout)


AttentionInterface.register(ATTENTION, mixer_attention)


class MixerLayer(nn.Module):
    """A layer mixer in transformers' calling convention for attention modules.

    `arguments`: what the forward of the module in whose place it is takes by name.
    """

    def __init__(self, mixer: LayerMixer, layer_idx: int, arguments: Collection[str]) -> None:
        super().__init__()
        self.mixer, self.layer_idx, self.arguments = mixer, layer_idx, frozenset(arguments)

    def forward(
        self, hidden_states: Tensor, *_args: object, mixer_call: MixerCall | None = None, **others: object
    ) -> tuple[Tensor, None]:
        """`hidden_states: [B, T, M]` -> `[B, T, M]`. Masks, caches and rotary positions that the teacher's module would
        take are not used: documents, padding and state are in the call.

        Raises:
            InputError: a call that did not come through the backbone, an argument that the teacher's module would not
                take, or one branch of a mixer that has only one.
        """
        mixer_call = require_call(mixer_call, self)
        refuse_unread(self, others, self.arguments)
        if (branch := mixer_call.branch_of(self.layer_idx)) != "both":
            name = self.mixer.config.name  # type: ignore[attr-defined]
            raise InputError(f"branch {branch!r}: layer {self.layer_idx} holds {name}, which has no branches")
        mixer = self.mixer
        if mixer_call.cache is None:
            return mixer(hidden_states, layout=mixer_call.layout, need_state=False)[0], None

        def run(raw: Pending, *, outputs: slice, **options: Unpack[RunOptions]) -> tuple[Tensor, MixerState | None]:
            return mixer.mix(*raw.inputs, layout=raw.layout, outputs=outputs.stop - outputs.start, **options)  # type: ignore[arg-type]  # its own state

        def cached(projected: tuple[Tensor, ...]) -> Tensor:
            return through_cache(mixer_call, self.layer_idx, mixer, projected, run)

        return mixer(hidden_states, layout=mixer_call.layout, cached=cached)[0], None
