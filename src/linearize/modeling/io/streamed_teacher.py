"""A teacher that is never in memory as a whole: its module tree without weights, and blocks of layers whose weights are
read when they are needed.

Letters: B batch, T tokens, M model width, V vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from linearize.errors import InputError, one_line
from linearize.modeling.blocks import Block, HiddenInput, make_block, reached, student_around
from linearize.modeling.config import LinearizeConfig
from linearize.modeling.io.checkpoint_checks import check_keys, check_numbers
from linearize.modeling.io.model_source import find_model, fit_pad_token, read_config
from linearize.modeling.io.quantized_teacher import quantization_of
from linearize.modeling.io.teacher import load_tokenizer
from linearize.modeling.io.weight_files import WeightFiles
from linearize.modeling.library_internals import (
    checkpoint_renamer,
    ignored_patterns,
    load_converted,
    use_batched_experts,
)
from linearize.modeling.probe import AttentionSite, probe
from linearize.modeling.surgery import install, share_weights
from linearize.modeling.truncate import cut_student_config, cut_tree, list_of_layers


class StreamedTeacher:
    """A causal LM of which only names and shapes are in memory.

    `skeleton`: the module tree, parameters on meta, buffers real. `sites`: its attention modules. `dtype`: in which it
    computes; `stored`: of its checkpoint.
    """

    def __init__(self, name: str, *, device: torch.device, trust_remote_code: bool = False) -> None:
        """Raises InputError: no such model, weights that are not whole, a family that cannot be converted."""
        self.name, self.device = name, device
        self.files = WeightFiles(name)
        source = find_model(name)
        self.config = read_config(source, trust_remote_code=trust_remote_code)
        if self.config.model_type == "linearized":
            raise InputError(f"{name} is a student already: give the teacher, a model with softmax attention")
        if (method := quantization_of(source, self.config)) is not None:
            raise InputError(
                f"{name} holds weights quantized by {method}, and --stream reads plain numbers: leave out --stream, or "
                "save the model in bfloat16 first"
            )
        check_numbers(name, self.files.types(), self.config)
        self.files.check_samples()
        self.tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        try:
            dtype = getattr(self.config, "dtype", None)
            self.stored = dtype if isinstance(dtype, torch.dtype) else torch.float32
            half = self.stored in (torch.float16, torch.bfloat16)
            self.dtype = torch.float32 if half and device.type == "cpu" else self.stored
            self.sites = sites_on_meta(self.config, trust_remote_code=trust_remote_code)
            with _parameters_on_meta(), no_init_weights():
                config = copy.deepcopy(self.config)
                skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config, dtype=self.dtype, trust_remote_code=trust_remote_code
                )
                self.skeleton = skeleton.eval()
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise InputError(f"cannot load {name} as a causal language model: {one_line(error)}") from error
        self.skeleton.requires_grad_(False)
        fit_pad_token(self.skeleton, self.tokenizer)
        self.layers = list_of_layers([site.name for site in self.sites])
        self.plain, self.converted, unread = _sources(self.skeleton, self.files)
        self._check_whole(unread)

    def tree(self, span: range, *, embedding: bool = False, head: bool = False) -> PreTrainedModel:
        """The layers `span` with their weights and whatever stands outside of all layers, in a tree that has the other
        layers on meta. Input embedding and head have weights only where they are asked for."""
        tree = share_weights(self.skeleton)
        without = set()
        if not embedding and not (head and self._tied()):
            without |= _names(tree, tree.get_input_embeddings())
        if not head and not (embedding and self._tied()):
            without |= _names(tree, tree.get_output_embeddings())
        prefixes = {f"{self.layers}.{layer}." for layer in span}

        def needed(name: str) -> bool:
            inside = name.startswith(f"{self.layers}.")
            return any(map(name.startswith, prefixes)) if inside else name not in without

        self._load(tree, needed)
        if (head or embedding) and self._tied():
            tree.get_output_embeddings().weight = tree.get_input_embeddings().weight
        return _placed(tree, self.device)

    def block(self, span: range) -> PreTrainedModel:
        """A tree of these layers alone, whose embedding and head compute nothing."""
        cut = cut_tree(self.tree(span), [site.name for site in self.sites], span)
        _blind(cut, self.dtype, self.device)
        return cut

    def _load(self, tree: PreTrainedModel, needed: Callable[[str], bool]) -> None:
        for name, key in self.plain.items():
            if needed(name):
                _set(tree, name, self.files.read(key).to(self.dtype))
        keys = [key for name, group in self.converted.items() if needed(name) for key in group]
        if keys:
            load_converted(tree, {key: self.files.lazy(key) for key in keys}, self.dtype)
            tree.requires_grad_(False)

    def _tied(self) -> bool:
        """Whether the head is the input embedding, and the checkpoint holds one of them alone."""
        head = _names(self.skeleton, self.skeleton.get_output_embeddings())
        return bool(self.config.get_text_config().tie_word_embeddings) and not head & set(self.plain)

    def _check_whole(self, unread: Sequence[str]) -> None:
        """Refuse weights that lack a parameter, have one of another shape, or hold tensors that nothing reads."""
        known = set(self.plain) | set(self.converted)
        tied = set(getattr(self.skeleton, "all_tied_weights_keys", None) or ())
        named = [name for name, _ in self.skeleton.named_parameters() if name not in known | tied]
        if self.converted:  # a converter may give several parameters for one name: seen when they are loaded
            named = [name for name in named if not name.startswith(f"{self.layers}.")]
        check_keys(
            self.name, self.config, missing=named, unexpected=unread, prefix=self.skeleton.base_model_prefix
        )  # fmt: skip
        for name, tensor in self.skeleton.state_dict().items():
            if name in self.plain and (shape := self.files.places[self.plain[name]].shape) != tuple(tensor.shape):
                raise InputError(
                    f"{self.name} holds {self.plain[name]} of shape {shape}, its config.json asks for "
                    f"{tuple(tensor.shape)}: they are not of the same model; copy or download the folder again"
                )


class StreamedBlocks:
    """Blocks of a streamed teacher and of its student, whose mixers start as in a conversion in memory."""

    def __init__(self, teacher: StreamedTeacher, config: LinearizeConfig, *, seed: int) -> None:
        """`config`: of the whole student. `seed`: drawn from it are the starts of all layers, one after the other."""
        self.streamed, self.config, self.seed, self.hidden_input = teacher, config, seed, HiddenInput()
        self.layers, self.model_dim = len(teacher.sites), config.attention_shapes()[0].model_dim
        self.dtype, self.device = teacher.stored, teacher.device

    def enter(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """See `Blocks`."""
        tree = self.streamed.tree(range(0), embedding=True)
        layers: Any = tree.get_submodule(self.streamed.layers)
        return lambda batch: reached(tree, layers[0], batch, before=True)

    def teacher(self, span: range) -> Block:
        """See `Blocks`."""
        return make_block(self.streamed.block(span), span, self.streamed.layers, self.hidden_input)

    def pair(self, span: range) -> Block:
        """See `Blocks`."""
        teacher = self.streamed.block(span)
        config = cut_student_config(self.config, span)
        plan, shapes = self.config.mixers(), self.config.attention_shapes()
        lm = share_weights(teacher)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for layer in range(span.start):  # the random numbers that earlier layers' mixers take
                if (mixer := plan[layer]) is not None:
                    mixer.build(shapes[layer])
            install(lm, [plan[i] for i in span], config.attention, [shapes[i] for i in span], start=True)
        return make_block(teacher, span, self.streamed.layers, self.hidden_input, student_around(lm, config))

    def head(self, as_tuple: bool) -> LMHead:
        """What turns the last layer's output into logits."""
        return LMHead(self.streamed, self.hidden_input, as_tuple)


class LMHead:
    """Final norm and head of a streamed teacher, run by the family's own forward; `vocabulary`: number of logits."""

    def __init__(self, teacher: StreamedTeacher, hidden_input: HiddenInput, as_tuple: bool) -> None:
        """`as_tuple`: whether layers of this family give their output in a tuple."""
        last = len(teacher.sites) - 1
        tree = teacher.tree(range(0), head=True)
        self.model: Any = cut_tree(tree, [site.name for site in teacher.sites], range(last, last + 1))
        self.hidden_input, self.device, self.dtype = hidden_input, teacher.device, teacher.dtype
        self.vocabulary: int = teacher.config.get_text_config().vocab_size
        _blind_embedding(self.model, self.dtype, self.device)
        layers: Any = self.model.get_submodule(teacher.layers)
        layers[0].forward = lambda *_args, **_kwargs: (hidden_input.hidden,) if as_tuple else hidden_input.hidden

    def logits(self, batch: Mapping[str, Tensor], hidden_BTM: Tensor) -> Tensor:
        """`[B, T, V]` from the last layer's output."""
        inputs = {name: batch[name].to(self.device) for name in ("input_ids", "position_ids")}
        with self.hidden_input.holding(hidden_BTM.to(self.device, self.dtype)):
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits


def sites_on_meta(config: Any, **options: Any) -> list[AttentionSite]:
    """The attention modules of a causal LM, from its config alone. Raises InputError as `probe` does."""
    own = copy.deepcopy(config)
    own.get_text_config().pad_token_id = None  # where there is one, some families look at the tokens' values
    for each in {id(each): each for each in (own, own.get_text_config())}.values():
        use_batched_experts(each)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(own, **options)
    return probe(model)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on meta and their buffers (rotary frequencies) as they are."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _sources(model: PreTrainedModel, files: WeightFiles) -> tuple[dict[str, str], dict[str, list[str]], list[str]]:
    """For each parameter the tensor of the checkpoint that it is; for the first parameter of each conversion (experts
    stacked) the tensors that it is made from; and the tensors that are neither, but for those that the family says it
    does without."""
    state: dict[str, Tensor] = model.state_dict()
    rename = checkpoint_renamer(model, state)
    plain: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    unread: list[str] = []
    without = [re.compile(pattern) for pattern in ignored_patterns(model)]
    for key in files.places:
        name, pattern = rename(key)
        if name not in state and key in state:
            name, pattern = key, None
        if name in state:
            if pattern is None:
                plain[name] = key
            else:
                converted.setdefault(name, []).append(key)
        elif not any(pattern.search(key) for pattern in without):
            unread.append(key)
    return plain, converted, unread


def _placed(tree: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """What has weights, and the buffers, on a device; what is on meta stays there."""
    for module in tree.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta and parameter.device != device:
                module._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return tree


def _set(tree: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = tree.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _names(tree: nn.Module, module: nn.Module | None) -> set[str]:
    """Names of a module's parameters in a tree."""
    if module is None:
        return set()
    where = next(name for name, child in tree.named_modules() if child is module)
    return {f"{where}.{name}" for name, _ in module.named_parameters()}


def _blind(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    _blind_embedding(model, dtype, device)
    head: Any = model.get_output_embeddings()
    head.forward = lambda hidden: hidden[..., :1]


def _blind_embedding(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    width = model.config.get_text_config().hidden_size
    embedding: Any = model.get_input_embeddings()
    embedding.forward = lambda ids: torch.zeros(*ids.shape, width, dtype=dtype, device=device)
