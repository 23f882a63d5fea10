"""What a model's attention is and does, found by running a few tokens: its modules, their sizes, and whether it keeps
the documents of a packed row apart.

Some families ignore positions that restart: their masks, or their own counters of positions, run on over the whole row
(OPT, BioGPT, BART's decoder). Rows for such a model hold one document each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from linearize.errors import InputError, one_line
from linearize.mixers import AttentionShape
from linearize.modeling.library_internals import attention_of, is_hooked, set_attention
from linearize.modeling.projections import are_read_rightly, with_biases

PROBE = "linearize_probe"
KNOWN_KEYWORDS = {"scaling", "softcap", "sliding_window", "dropout", "is_causal", "linearize_probe_calls"}
LAYER_TYPES = {"full_attention", "sliding_attention"}
HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}
FIRST, SECOND = 7, 6  # tokens of the two documents
RIGHT = 0.1  # of the difference that the first document makes where it is seen: anything less is rounding

Run = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention module of a teacher: where it is, its sizes, and the window it is limited to (None: none).

    `readable`: whether its projections, as they are read here, give the q, k and v that its attention sees.
    """

    name: str
    layer: int
    shape: AttentionShape
    sliding_window: int | None
    readable: bool = True

    @property
    def far_groups(self) -> int:
        """Key/value groups that see the whole text; none where the attention is limited to a window."""
        return self.shape.num_kv_heads if self.sliding_window is None else 0


def probe(model: PreTrainedModel) -> list[AttentionSite]:
    """The attention modules of a causal LM, by layer, found by running three tokens through it; changes nothing.

    Raises:
        InputError: a family whose attention does not go through transformers' attention interface, or computes
        something that no mixer
            does (attention sinks, biases); says which.
    """
    family = model.config.model_type
    _check_layer_types(model)
    calls: list[dict[str, Any]] = []
    try:
        check_not_offloaded(model)
        with torch.no_grad(), routed(model, PROBE):
            ids = torch.tensor([[0, 1, 2]], device=model.device) % model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
            with _inputs_noted(model) as hidden:
                model(input_ids=ids, use_cache=False, linearize_probe_calls=calls)
    except InputError as error:
        raise InputError(f"{family} cannot be converted: {error}") from error
    except Exception as error:
        raise InputError(
            f"{family} cannot be converted: its attention could not be probed ({one_line(error)})"
        ) from error
    with routed(model, PROBE):  # without dropout, as above
        return _sites(model, calls, hidden)


@contextmanager
def _inputs_noted(model: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """The first input of every module of the model that knows its layer, as attention modules do."""
    hidden: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arriving = args[0] if args else kwargs.get("hidden_states")
        if isinstance(arriving, Tensor):
            hidden[module] = arriving

    known = [module for module in model.modules() if getattr(module, "layer_idx", None) is not None]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in known]
    try:
        yield hidden
    finally:
        for hook in hooks:
            hook.remove()


def check_not_offloaded(module: nn.Module) -> None:
    """Refuse weights that come for the call alone (accelerate's offload): no mixer could start from or beside them."""
    hooked = any(is_hooked(part) for part in module.modules())
    if hooked and any(parameter.is_meta for parameter in module.parameters()):
        raise InputError("its weights are offloaded, which can be run but not converted: load it without offload")


def _check_layer_types(model: PreTrainedModel) -> None:
    """Refuse layers that remember more than keys and values or see one chunk of the text: no mixer could stand in."""
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if others:
        raise InputError(
            f"{model.config.model_type} cannot be converted: it has layers of type {', '.join(sorted(others))}, "
            f"all must be {' or '.join(sorted(LAYER_TYPES))}"
        )


@contextmanager
def routed(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """All attention of a model through this attention function inside the `with` block."""
    configs = attention_configs(model)
    before = [attention_of(config) for config in configs]
    was_training = model.training
    try:
        for config in configs:
            set_attention(config, implementation)
        model.eval()
        yield
    finally:
        model.train(was_training)
        for config, old in zip(configs, before, strict=True):
            set_attention(config, old)


def attention_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The config objects of a model's modules, each once."""
    configs: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs[id(config)] = config
    return list(configs.values())


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    calls = kwargs.get("linearize_probe_calls")
    if calls is None:
        raise InputError("its attention modules do not pass keywords on to the attention function")
    extra = {k for k, v in kwargs.items() if v is not None} - KNOWN_KEYWORDS - HARMLESS
    odd = {name for name in extra if isinstance(kwargs[name], Tensor | nn.Parameter)}
    if not (getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]):
        raise InputError("its attention looks ahead (it is no decoder), a mixer only looks back")
    calls.append(
        {"module": module, "q": query, "k": key, "v": value, "window": kwargs.get("sliding_window"), "odd": odd}
    )
    rows = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return rows.transpose(1, 2), None


AttentionInterface.register(PROBE, _probe_attention)


def _sites(model: PreTrainedModel, calls: list[dict[str, Any]], hidden: dict[nn.Module, Tensor]) -> list[AttentionSite]:
    family, layers = model.config.model_type, model.config.get_text_config().num_hidden_layers
    names = {id(module): name for name, module in model.named_modules()}
    sites = []
    for call in calls:
        if call["odd"]:
            raise InputError(f"{family} cannot be converted: its attention also uses {', '.join(sorted(call['odd']))}")
        q, k, v = call["q"], call["k"], call["v"]
        shape = AttentionShape(
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[3],
            value_dim=v.shape[3],
            **body_sizes(model.config),
        )
        layer = getattr(call["module"], "layer_idx", None)
        if layer is None or id(call["module"]) not in names:
            raise InputError(f"{family} cannot be converted: its attention modules do not know their layer")
        noted = hidden.get(call["module"])
        sites.append(
            AttentionSite(
                name=names[id(call["module"])],
                layer=layer,
                shape=with_biases(call["module"], shape),
                sliding_window=call["window"],
                readable=noted is None
                or not _has_numbers(noted)
                or are_read_rightly(call["module"], noted, (q, k, v), shape),
            )
        )
    sites.sort(key=lambda site: site.layer)
    if [site.layer for site in sites] != list(range(layers)):
        seen = len({site.layer for site in sites})
        raise InputError(
            f"{family} cannot be converted: {seen} of its {layers} layers call transformers' attention interface; "
            "all must, once per pass"
        )
    return sites


def body_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """What an `AttentionShape` says of the model around the attention."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")
    eps = next((value for name in names if (value := getattr(text, name, None)) is not None), 1e-6)  # some are null
    theta = rope.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0
    return {"model_dim": text.hidden_size, "norm_eps": float(eps), "rope_theta": float(theta)}


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether a causal LM gives two documents of one row what it gives each alone, found by running a few tokens."""

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(**{name: x.to(model.device) for name, x in batch.items()}, use_cache=False).logits
        return logits

    was_training = model.training
    try:
        model.eval()
        return keeps_apart(run, model.config.get_text_config().vocab_size)
    finally:
        model.train(was_training)


@torch.no_grad()
def keeps_apart(run: Run, vocabulary: int) -> bool:
    """The same of a function from `input_ids` and `position_ids` `[1, T]` to what it computes of them, `[1, T, .]`.

    The second document's outputs are compared with those that it has alone; how far off they are is measured by what
    they would be as the continuation of the first.
    """
    ids = (torch.arange(FIRST + SECOND) * 7 + 5)[None] % vocabulary
    running = torch.arange(FIRST + SECOND)[None]
    restarting = torch.cat([running[:, :FIRST], running[:, :SECOND]], dim=1)
    packed, continued = (
        run({"input_ids": ids, "position_ids": positions})[:, FIRST:].double() for positions in (restarting, running)
    )
    alone = run({"input_ids": ids[:, FIRST:], "position_ids": running[:, :SECOND]}).double()
    return bool((packed - alone).norm() <= RIGHT * (continued - alone).norm())


def _has_numbers(x: Tensor) -> bool:
    """Whether there is something to compare: not on the meta device, nor in a simulation (`torch._subclasses`)."""
    return type(x) is Tensor and not x.is_meta
