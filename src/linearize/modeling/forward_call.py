"""One forward pass of a student: its arguments checked, and what its mixers are told.

The same preparation serves two callers: `LinearizedForCausalLM.forward`, and a hook on the backbone for code that calls
it directly (`student.base_model`, `student.lm`, trl's fused language-model head, feature extraction).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from linearize.errors import InputError, unknown
from linearize.modeling.attention import COMMON, AttentionOverride, MixerCall, parameter_names
from linearize.modeling.cache import MixerCacheLayer
from linearize.modeling.cache_argument import cache_argument, given_cache
from linearize.modeling.growing_layer import use_growing_layers
from linearize.modeling.library_internals import remove_pre_hooks
from linearize.modeling.ragged_cache import check_past_mask
from linearize.modeling.static.cache import StaticMixerLayer
from linearize.ops.layout import Layout

if TYPE_CHECKING:
    from linearize.modeling.config import LinearizeConfig
    from linearize.ops.window_linear import Branch

LOG = logging.getLogger("linearize")
OF_MIXERS = (MixerCacheLayer, StaticMixerLayer)
DOCUMENT_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


@dataclass(frozen=True, eq=False)
class ForwardCall:
    """The arguments of one pass of the teacher's own class, with what the mixers are told."""

    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: Cache | None
    use_cache: bool
    mixer_call: MixerCall


def prepare_call(
    config: LinearizeConfig,
    lm: nn.Module,
    *,
    tokens: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    use_cache: bool | None,
    branch: Branch | Mapping[int, Branch] = "both",
    attention_override: AttentionOverride | None = None,
) -> ForwardCall:
    """Read documents and padding, and make the cache where one is wanted.

    `tokens: [B, T]` ids or `[B, T, M]` embeddings. Without `use_cache` a cache is made in eval mode, as transformers
    does, but for packed rows: their documents have no common past.

    Raises:
        InputError: a mask of another form than `[B, past + T]`, or a cache that cannot hold this student's state.
    """
    replayed = is_replayed(lm)
    if replayed and (use_cache or cache is not None):
        _refuse_past(cache)
        cache = None
    cache = None if cache is None else student_cache(cache, config)
    layout = Layout.from_inputs(
        num_tokens=tokens.shape[1],
        past=0 if cache is None else int(cache.get_seq_length()),  # a static cache gives a tensor that it counts on
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_is_packed=cache is not None and any(getattr(layer, "is_packed", False) for layer in cache.layers),
    )
    check_past_mask(cache, attention_mask)
    is_packed = layout.opens_inside(tokens.shape[1], tokens.device)
    if is_packed and attention_mask is not None and position_ids is not None:
        position_ids, attention_mask = _apart(position_ids, attention_mask, tokens.shape[1]), None
    elif position_ids is None and layout.position_BT is not None:
        position_ids = layout.position_BT.clamp(min=0)  # counted from each row's first token
    if use_cache is None:
        by_config = config.use_cache is not False and getattr(getattr(lm, "config", config), "use_cache", True)
        use_cache = cache is not None or bool(by_config and not lm.training and not is_packed)
    use_cache = use_cache and not replayed
    if use_cache and is_packed and any(entry is None for entry in config.plan):
        raise InputError(
            "packed rows (position_ids that restart) cannot fill a cache: layers that keep softmax attention would mix "
            "their documents; pass use_cache=False, or one document in a row"
        )
    if use_cache and cache is None:
        cache = use_growing_layers(DynamicCache(config=config))
    return ForwardCall(
        attention_mask,
        position_ids,
        cache,
        use_cache,
        MixerCall(layout, cache if use_cache else None, branch, attention_override),
    )


def is_replayed(lm: nn.Module) -> bool:
    """Whether the backward pass will run layers a second time (gradient checkpointing)."""
    if not (lm.training and torch.is_grad_enabled()):
        return False
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in lm.modules())


def _refuse_past(cache: Cache | None) -> None:
    """A layer that runs again in the backward pass would go on from the state after the tokens: there is no cache.

    Raises:
        InputError: a cache that holds tokens, which cannot be left out without another result.
    """
    if cache is not None and cache.get_seq_length():
        raise InputError(
            f"the cache holds {cache.get_seq_length()} tokens, and training with gradient checkpointing runs layers "
            "twice: train without a cache, or call gradient_checkpointing_disable()"
        )
    LOG.warning("training with gradient checkpointing runs layers twice: no cache is used")


def student_cache(cache: Cache, config: LinearizeConfig) -> Cache:
    """The cache with layers for this student's mixers; an empty `DynamicCache` of another make gets them.

    So does an empty `StaticCache` of a hybrid: transformers masks the unwritten memory of its softmax layers only where
    every layer is of that kind, so they grow instead (`StaticStep` decodes hybrids in fixed memory).

    Raises:
        InputError: a cache that was filled by another model, or of a kind that holds no mixer's state.
    """
    layers = cache.layers
    is_static = isinstance(cache, StaticCache) and not all(config.plan)
    fits = (
        not (is_static and any(isinstance(layer, StaticLayer) for layer in layers))
        and len(layers) == len(config.plan)
        and all(entry is None or isinstance(layer, OF_MIXERS) for layer, entry in zip(layers, config.plan, strict=True))
    )
    if fits:
        return use_growing_layers(cache)
    if (is_static or isinstance(cache, DynamicCache)) and int(cache.get_seq_length()) == 0:
        cache.layers = DynamicCache(config=config).layers
        cache.layer_class_to_replicate = None
        return use_growing_layers(cache)
    raise InputError(
        f"this {type(cache).__name__} has no layers for the student's mixers (it holds {cache.get_seq_length()} tokens "
        f"in {len(layers)} layers): pass DynamicCache(config=student.config), or none and use_cache=True"
    )


def _apart(position_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Tensor:
    """Positions of packed rows with dead tokens at 0: without a mask, softmax layers tell documents by their restarts,
    and a dead token is one of its own."""
    live_BT = attention_mask[:, -num_tokens:].bool()
    return position_ids.expand_as(live_BT).masked_fill(~live_BT, 0)


def check_keywords(owner: str, arguments: Mapping[str, object], known: Collection[str]) -> None:
    """Refuse keywords that a forward would take and ignore: a cache, a mask or positions under a name it does not
    handle change the result.

    Raises:
        InputError: an unknown keyword, or documents without positions.
    """
    for name in arguments:
        if name not in known and arguments[name] is not None:
            raise unknown(f"argument of {owner}", name, sorted(known))
        if name.endswith("_mask") and name != "attention_mask" and arguments[name] is not None:
            raise InputError(f"{name}: mixers know one mask, attention_mask: [batch, past + tokens] of 0 and 1")
    if arguments.get("is_causal") is False:
        raise InputError("is_causal=False: a mixer looks back only; leave it out")
    documents = [name for name in DOCUMENT_KEYWORDS if arguments.get(name) is not None]
    if documents and arguments.get("position_ids") is None:
        raise InputError(f"{documents[0]} without position_ids: pack rows with position_ids that restart per document")


def known_keywords(*modules: nn.Module) -> frozenset[str]:
    """What the forwards of these modules take, and what transformers hands through all of them."""
    return _known(*(type(module).forward for module in modules))


@functools.cache
def _known(*forwards: Callable[..., object]) -> frozenset[str]:
    """`known_keywords`, put together once and not for every decoded token."""
    return COMMON.union(*map(parameter_names, forwards))


class BackboneHook:
    """Gives the mixers their arguments where the backbone is called by itself, not through the student."""

    def __init__(self, config: LinearizeConfig) -> None:
        self.config = config

    def install(self, backbone: nn.Module) -> None:
        """Put the hook in, in the place of that of another student around the same modules."""
        remove_pre_hooks(backbone, BackboneHook)
        backbone.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The call's arguments by name, with those of the mixers; None where they are there already."""
        if kwargs.get("mixer_call") is not None or kwargs.get("linearize_probe_calls") is not None:
            return None
        arguments = dict(zip(parameter_names(type(backbone).forward), args, strict=False)) | kwargs
        check_keywords(type(backbone).__name__, arguments, known_keywords(backbone) | {"cache", "past_key_values"})
        tokens = arguments["inputs_embeds"] if arguments.get("input_ids") is None else arguments["input_ids"]
        call = prepare_call(
            self.config,
            backbone,
            tokens=tokens,
            attention_mask=arguments.get("attention_mask"),
            position_ids=arguments.get("position_ids"),
            cache=given_cache(arguments.pop("cache", None), arguments.pop("past_key_values", None)),
            use_cache=arguments.get("use_cache"),
        )
        arguments |= {"attention_mask": call.attention_mask, "position_ids": call.position_ids}
        arguments |= {cache_argument(backbone): call.cache, "use_cache": call.use_cache, "mixer_call": call.mixer_call}
        return (), arguments


def positions_to_keep(logits_to_keep: int | Tensor, tokens: Tensor) -> int | Tensor:
    """The last positions as an index on CPUs: a slice has the strides of the whole prompt, and a 16-bit product with it
    copies the LM head's weights first (SmolLM2: 405 ms in place of 15)."""
    count, length = logits_to_keep, tokens.shape[1]
    if not isinstance(count, int) or not 0 < count < length or tokens.device.type != "cpu":
        return count
    return torch.arange(length - count, length, device=tokens.device)


def last_logits(model: nn.Module, tokens: Tensor) -> dict[str, int | Tensor]:
    """The argument with which a model computes the logits of the last token alone; none where it has no such one."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": positions_to_keep(1, tokens)} if known else {}
