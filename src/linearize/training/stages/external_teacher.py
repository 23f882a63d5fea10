"""Another, usually larger model as the teacher of a student: it must have the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.io.checkpoint_checks import check_finite_outputs, check_finite_weights
from linearize.modeling.io.model_source import find_model, read_config
from linearize.modeling.io.teacher import load_teacher, load_tokenizer
from linearize.modeling.io.weight_files import WeightFiles
from linearize.modeling.probe import keeps_documents_apart
from linearize.modeling.sharding import shards_of
from linearize.training.distributed import current


def check_vocabulary(name: str, student: LinearizedForCausalLM) -> None:
    """Compare vocabularies from configs and tokenizers alone; a few values of each weight are read.

    Where both tokenizers can be loaded they must map the same strings to the same ids, and the sizes may differ by
    padding; otherwise the sizes must be equal.

    Raises:
        InputError: no such model, a teacher with another vocabulary, or one that diverged.
    """
    theirs, ours = _vocabulary_size(name), int(student.config.get_text_config().vocab_size)
    their_tokens, our_tokens = _tokens(name), _tokens(student.config.teacher_name)
    same = None if their_tokens is None or our_tokens is None else their_tokens == our_tokens
    if same is False:
        raise InputError(
            f"the teacher {name} has another vocabulary: its tokenizer maps {len(their_tokens or {})} tokens, "
            f"the student's {len(our_tokens or {})}, and not to the same ids; give one with the student's tokenizer"
        )
    if same is None and theirs != ours:
        raise InputError(
            f"the teacher {name} has another vocabulary: {theirs} tokens, the student has {ours}; "
            "give one with the student's tokenizer"
        )
    check_samples(name)


def check_samples(name: str) -> None:
    """Check a few values of each weight in a folder. Raises InputError for NaN."""
    source = find_model(name)
    if source.gguf_file is None and Path(source.name).is_dir():
        WeightFiles(source.name).check_samples()


def load_other_teacher(name: str, student: LinearizedForCausalLM) -> Any:
    """The other teacher on the student's device, frozen; on a CPU in fp32. Sharded as the student is.

    Raises:
        InputError: it cannot be loaded, gives NaN, or mixes the documents of a packed row where the student's family
            does not.
    """
    shards = shards_of(student)

    def read() -> Any:
        teacher, _ = load_teacher(name, device=student.device if shards is None else "cpu")
        on_cpu = student.device.type == "cpu" and teacher.dtype in (torch.float16, torch.bfloat16)
        teacher = teacher.float() if on_cpu else teacher
        family = teacher.config.model_type  # the student's own: rows hold one document where that cannot do it either
        if family != student.config.teacher["model_type"] and not keeps_documents_apart(teacher):
            raise InputError(
                f"the teacher {name} is of a family ({family}) that does not keep the documents of a packed row apart: "
                "give one of another family"
            )
        check_finite_weights(teacher, name)
        check_finite_outputs(teacher, name)
        return teacher

    teacher = current().share(read)
    if shards is not None:
        shards.place([teacher])
    return teacher


def _vocabulary_size(name: str) -> int:
    size = getattr(read_config(find_model(name)).get_text_config(), "vocab_size", None)
    if size is None:
        raise InputError(f"{name} as a teacher: its config names no vocabulary; give a causal language model")
    return int(size)


def _tokens(name: str | None) -> dict[str, int] | None:
    """A tokenizer's tokens and their ids, None if there is no tokenizer."""
    if name is None:
        return None
    try:
        vocabulary: dict[str, int] = load_tokenizer(name).get_vocab()
    except InputError:  # whatever keeps a tokenizer from loading, the sizes are still there to compare
        return None
    return vocabulary
