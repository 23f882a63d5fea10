"""The plan applied to a teacher: first everything is looked at, then everything is changed, or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from linearize.errors import InputError, one_line
from linearize.mixers import AttentionMixer, AttentionShape, LayerMixer, Mixer, MixerConfig
from linearize.modeling.attention import ATTENTION, parameter_names
from linearize.modeling.io.nf4 import nf4_states
from linearize.modeling.mixer_layer import MixerLayer
from linearize.modeling.parallel import is_unit, whole
from linearize.modeling.projections import are_read_rightly, attention_weights, with_biases

PROBE = "linearize_probe"
KNOWN_KEYWORDS = {"scaling", "softcap", "sliding_window", "dropout", "is_causal", "linearize_probe_calls"}
LAYER_TYPES = {"full_attention", "sliding_attention"}
HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}


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
        _check_not_offloaded(model)
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
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(given, Tensor):
            hidden[module] = given

    known = [module for module in model.modules() if getattr(module, "layer_idx", None) is not None]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in known]
    try:
        yield hidden
    finally:
        for hook in hooks:
            hook.remove()


def _check_not_offloaded(module: nn.Module) -> None:
    """Refuse weights that come for the call alone (accelerate's offload): no mixer could start from or beside them."""
    hooked = any(hasattr(part, "_hf_hook") for part in module.modules())
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
    before = [config._attn_implementation for config in configs]
    was_training = model.training
    try:
        for config in configs:
            config._attn_implementation = implementation
        model.eval()
        yield
    finally:
        model.train(was_training)
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old


def attention_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The config objects of a model's modules, each once."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


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
                or _has_no_values(noted)
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


def _has_no_values(tensor: Tensor) -> bool:
    """Whether a tensor is a shape alone, whose values cannot be checked: meta, or fake in a simulation."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


def check_plan(
    plan: Sequence[MixerConfig | None], sites: Sequence[AttentionSite], family: str
) -> list[MixerConfig | None]:
    """The plan as it will be applied: a layer that the teacher limits to at most the mixer's window stays as it is.

    Such a layer is linear already, and no mixer would be nearer to it than itself.

    Raises:
        InputError: a plan of another length than the model, or a mixer that takes something from projections which
            cannot be read.
    """
    if len(plan) != len(sites):
        raise InputError(
            f"the plan has {len(plan)} layers, {family} has {len(sites)}: give one mixer (or none) per layer"
        )
    checked = [None if _is_local(mixer, site) else mixer for mixer, site in zip(plan, sites, strict=True)]
    for mixer, site in zip(checked, sites, strict=True):
        if mixer is not None and mixer.reads_projections and not site.readable:
            raise InputError(
                f"{mixer.name} cannot start from layer {site.layer} of {family}: its attention sees other queries, "  # type: ignore[attr-defined]
                "keys or values than its projections give, as far as they are known here; use lolcats"
            )
    return checked


def _is_local(mixer: MixerConfig | None, site: AttentionSite) -> bool:
    window = getattr(mixer, "window", None)
    return window is not None and site.sliding_window is not None and site.sliding_window <= window


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same tensors: the student's, so that teacher and student cost the memory of one."""
    shared = [*model.parameters(), *model.buffers(), *nf4_states(model)]
    return copy.deepcopy(model, {id(part): part for part in shared})


def body_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """What an `AttentionShape` says of the model around the attention."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")
    eps = next((value for name in names if (value := getattr(text, name, None)) is not None), 1e-6)  # some are null
    theta = rope.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0
    return {"model_dim": text.hidden_size, "norm_eps": float(eps), "rope_theta": float(theta)}


def install(
    lm: PreTrainedModel,
    plan: Sequence[MixerConfig | None],
    names: Sequence[str],
    shapes: Sequence[AttentionShape],
    *,
    start: bool,
    layers: Sequence[int] | None = None,
) -> None:
    """Put the plan's mixers into `lm` (of `layers`; None: all) and route the modules that stay to them.

    `start`: layer mixers start from the modules they replace; otherwise a checkpoint will fill them.

    Raises:
        InputError: a layer mixer for attention that it cannot start from; `lm` is unchanged then.
    """
    wanted = range(len(plan)) if layers is None else layers
    made = {i: _made(lm.get_submodule(names[i]), mixer, shapes[i], start) for i in wanted if (mixer := plan[i])}
    routed: dict[int, PreTrainedConfig] = {}
    for i, built in made.items():
        if isinstance(built, LayerMixer):
            lm.set_submodule(names[i], MixerLayer(built, i, parameter_names(type(lm.get_submodule(names[i])).forward)))
        else:
            _route(lm.get_submodule(names[i]), built, routed)
    if all(mixer is not None for mixer in plan):  # no layer needs a T x T mask
        for config in attention_configs(lm):
            config._attn_implementation = ATTENTION


def _made(module: nn.Module, config: MixerConfig, shape: AttentionShape, start: bool) -> Mixer:
    """The mixer, started, on the module's device; what is not to stay in fp32 in the module's dtype (that of its
    numbers of 16 bits or more: rounded weights are no dtype to compute in).

    Raises:
        InputError: weights that are offloaded.
    """
    mixer = config.build(shape)
    held = list(module.parameters())
    if not held:
        return mixer
    _check_not_offloaded(module)
    dtype = next((p.dtype for p in held if p.is_floating_point() and p.itemsize > 1), None)
    if isinstance(mixer, LayerMixer) and start and mixer.config.initialise != "random":
        with whole(module):
            mixer.start_from(attention_weights(module, shape))
            if is_unit(module):  # its whole weights are gone afterwards: a start may not be a view of them
                for parameter in mixer.parameters():
                    parameter.data = parameter.data.clone()
    for name, parameter in mixer.named_parameters():
        keeps = dtype is None or mixer.fp32_parameters is None or name in mixer.fp32_parameters
        parameter.data = parameter.data.to(device=held[0].device, dtype=parameter.dtype if keeps else dtype)
    for buffer in mixer.buffers():
        buffer.data = buffer.data.to(held[0].device)
    return mixer


def _route(module: Any, mixer: Mixer, routed: dict[int, PreTrainedConfig]) -> None:
    """Let an attention module call the mixer: its config becomes a copy that names our attention function."""
    old = module.config
    if id(old) not in routed:
        routed[id(old)] = copy.copy(old)
        routed[id(old)]._attn_implementation = ATTENTION
    module.config = routed[id(old)]
    module.mixer = mixer
    if isinstance(mixer, AttentionMixer) and mixer.needs_keys:
        module.register_forward_pre_hook(_hand_on_hidden, with_kwargs=True)


def _hand_on_hidden(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The module's input as a keyword, which transformers passes on to the attention function."""
    return args, {**kwargs, "mixer_hidden": args[0] if args else kwargs["hidden_states"]}
