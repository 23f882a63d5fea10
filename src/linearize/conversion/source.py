"""The teacher of a conversion: a folder, a Hub model at one commit, or a model in memory."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.modeling.io.hub import local_copy
from linearize.modeling.io.quantized import has_quantized
from linearize.modeling.io.teacher import own_tokenizer
from linearize.modeling.surgery import share_weights

DeviceMap = str | dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherSource:
    """`name`: in messages, reports and the student's config. `path`: what is read. `commit`: of a Hub model.
    `model`, `tokenizer`: of a teacher in memory, which is not read. `dtype`, `device_map`: to load it with."""

    name: str
    path: str
    commit: str | None = None
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    dtype: torch.dtype | str | None = None
    device_map: DeviceMap | None = None
    trust_remote_code: bool = False

    @property
    def pinned(self) -> dict[str, str]:
        """For the report: the commit of a Hub model."""
        return {} if self.commit is None else {"teacher_commit": self.commit}


def teacher_source(
    teacher: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
) -> TeacherSource:
    """A teacher as it was named, or as it is in memory; a Hub model is fetched into the cache.

    Raises:
        InputError: a model of another library, options of files for a model in memory, no tokenizer, or a Hub model
            that cannot be fetched.
    """
    if isinstance(teacher, (str, os.PathLike)):
        if tokenizer is not None:
            raise InputError(
                f"tokenizer given for {teacher}, which brings its own: leave it out, or give a loaded model"
            )
        place = local_copy(teacher, revision=revision, token=token, code=trust_remote_code)
        return TeacherSource(
            name=place.name, path=place.path, commit=place.commit, dtype=dtype, device_map=device_map,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if not isinstance(teacher, PreTrainedModel):
        raise InputError(
            f"a model of the class {type(teacher).__name__} given: give a causal language model of transformers, a "
            "folder or a Hub name"
        )
    options = {"revision": revision, "token": token, "dtype": dtype, "device_map": device_map}
    if present := [name for name, value in options.items() if value is not None]:
        raise InputError(f"{present[0]} given for a model in memory, which is loaded already: leave it out")
    if has_quantized(teacher):
        raise InputError("the weights of the model in memory are quantized: give its folder, which is read as numbers")
    origin = teacher.name_or_path or ""
    if tokenizer is None:
        tokenizer = own_tokenizer(teacher)
    return TeacherSource(
        name=origin or type(teacher).__name__, path=origin, commit=getattr(teacher.config, "_commit_hash", None),
        model=teacher, tokenizer=tokenizer,
    )  # fmt: skip


def frozen_view(model: PreTrainedModel, *, as_fp32: bool = False) -> PreTrainedModel:
    """A second module tree over the same numbers, frozen and in eval mode; the model itself keeps its mode and what it
    trains. `as_fp32`: over numbers of its own, in fp32."""
    if as_fp32:
        return copy.deepcopy(model).float().eval().requires_grad_(False)
    view = share_weights(model)
    frozen: dict[int, nn.Parameter] = {}
    for module in view.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = frozen.setdefault(id(parameter), nn.Parameter(parameter.data, requires_grad=False))
            setattr(module, name, own)
    return view.eval()
