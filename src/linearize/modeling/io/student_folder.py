"""Writing a student's folder: weights, config, generation config, tokenizer, and adapters that were not merged."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from linearize.errors import InputError, one_line
from linearize.modeling.io.adapters import kept_adapters, save_adapters, without_product
from linearize.modeling.io.nf4 import is_nf4
from linearize.modeling.io.quantized import has_quantized
from linearize.modeling.io.weight_files import SHARD_BYTES, Entry, ShardedWriter
from linearize.modeling.library_internals import saved_names, without_tied
from linearize.modeling.parallel import whole_state
from linearize.modeling.sharding import shards_of
from linearize.storage.disk import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linearize.modeling.student import LinearizedForCausalLM

LOG = logging.getLogger("linearize")


def save_student(student: LinearizedForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
    """Config, weights (safetensors), generation config and tokenizer; adapters that were not merged go to
    `adapter/`.

    A sharded student is gathered and written tensor by tensor: all ranks call it, those that write nothing with None.
    """
    kept = kept_adapters(student)
    size = sum(parameter.nbytes for parameter in student.parameters())
    with without_product(student, kept), writing("the student", folder or Path(), size):
        if shards_of(student) is not None:
            _save_sharded(student, folder)
        elif folder is not None:
            student.save_pretrained(folder)
    if folder is None:
        return
    with writing("the student's tokenizer and adapters", folder):
        tokenizer.save_pretrained(folder)
        if kept is not None:
            save_adapters(kept, folder)


def check_saving(student: LinearizedForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Try all that saving a student needs but the writing of its weights, before it is trained: write its documents
    into a folder that is removed, read them again, and see that the weights fit them.

    Raises:
        InputError: something could not be written, or not be read as it was.
    """
    try:
        with TemporaryDirectory() as name, torch.random.fork_rng(devices=[]):
            save_config(student, Path(name))
            tokenizer.save_pretrained(name)
            AutoTokenizer.from_pretrained(name)
            with torch.device("meta"):
                again = type(student)(type(student.config).from_pretrained(name))
        saved, read = _own_parameters(student), _own_parameters(again)
        wrong = sorted(name for name in {*saved, *read} if saved.get(name) != read.get(name))
        if not wrong and not has_quantized(student) and not student.get_input_embeddings().weight.is_meta:
            without_tied(student.state_dict(), student)  # refuses memory shared otherwise
    except Exception as error:  # whatever keeps it from being saved
        raise InputError(
            f"the student could not be saved after its training, so it is not begun: {one_line(error)} (its config, "
            "generation config, tokenizer and the sharing of its weights come from the teacher: mend them there)"
        ) from error
    if wrong:
        raise InputError(
            f"the student could not be loaded after its training, so it is not begun: its config describes another "
            f"model ({wrong[0]} and {len(wrong) - 1} more differ); mend the teacher's config.json"
        )


def _own_parameters(model: Any) -> dict[str, tuple[int, ...]]:
    """The sizes of parameters, but for those that are others under a second name."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}
    return {name: tuple(p.quant_state.shape if is_nf4(p) else p.shape) for name, p in parameters.items()}


def valid_generation_config(config: GenerationConfig) -> GenerationConfig:
    """As much of a generation config as transformers calls valid, and lets one save; itself where all of it is.

    What is left out (a temperature without sampling) `generate` ignores; it is said in a warning.
    """
    if _is_valid(config):
        return config
    default, valid = GenerationConfig(), copy.deepcopy(config)
    left = {name: value for name, value in vars(config).items() if value != getattr(default, name, value)}
    for name in left:
        setattr(valid, name, getattr(default, name))
    while kept := [name for name, value in left.items() if _is_valid(valid, {name: value})]:
        setattr(valid, kept[0], left.pop(kept[0]))
    LOG.warning("the teacher's generation config sets %s, which has no effect there: left out", ", ".join(left))
    return valid


def _is_valid(config: GenerationConfig, changes: Mapping[str, object] | None = None) -> bool:
    tried = copy.deepcopy(config)
    for name, value in (changes or {}).items():
        setattr(tried, name, value)
    try:
        tried.validate(strict=True)
    except ValueError:
        return False
    return True


def save_config(student: LinearizedForCausalLM, folder: Path, dtype: torch.dtype | None = None) -> None:
    """What tells a loader of the weights in a student's folder. `dtype`: in which they will be loaded, if in another
    than they have now."""
    student.config.architectures = [type(student).__name__]
    student.config.dtype = dtype or student.dtype
    student.config.save_pretrained(folder)
    student.config.dtype = student.dtype
    student.generation_config.save_pretrained(folder)


def _save_sharded(student: LinearizedForCausalLM, folder: Path | None) -> None:
    """Never more than one whole tensor in memory, but for families whose tensors transformers joins or splits."""
    entries = _entries(student)
    if entries is None:
        state = dict(whole_state(student))
        if folder is not None:
            student.save_pretrained(folder, state_dict=state)
        return
    writer = None if folder is None else ShardedWriter(folder, entries, SHARD_BYTES)
    for name, tensor in whole_state(student):
        if writer is not None and name in entries:
            writer.write(name, tensor)
    if writer is not None and folder is not None:
        writer.close()
        save_config(student, folder)


def _entries(student: LinearizedForCausalLM) -> dict[str, Entry] | None:
    """Dtype and shape of every tensor of a folder, tied ones once; None: transformers saves others than these."""
    state: dict[str, Tensor] = student.state_dict(keep_vars=True)
    marks = {id(tensor): torch.empty(1) for tensor in state.values()}
    names = without_tied({name: marks[id(state[name])] for name in state}, student)
    shapes = {name: torch.empty(state[name].shape, dtype=state[name].dtype, device="meta") for name in names}
    saved = saved_names(student, shapes)
    if {name: x.shape for name, x in saved.items()} != {name: x.shape for name, x in shapes.items()}:
        return None
    return {name: (x.dtype, tuple(x.shape)) for name, x in shapes.items()}
