"""Hand `linearize serve` over to `vllm serve`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence

from linearize.errors import InputError

ARGUMENTS = {
    "host": "--host", "port": "--port", "name": "--served-model-name", "slots": "--max-num-seqs",
    "context": "--max-model-len", "revision": "--revision", "dtype": "--dtype",
}  # fmt: skip
"""Options that vLLM has too."""
SECRETS = {"api_key": "VLLM_API_KEY", "token": "HF_TOKEN"}
"""Options that it reads from the environment: every user of a machine can see the arguments of its processes."""


def vllm_arguments(model: str, options: Mapping[str, object]) -> list[str]:
    """The arguments of `vllm` for the options that were set.

    Raises:
        InputError: an option of the embedded engine alone.
    """
    own = sorted(name for name in options if name not in ARGUMENTS and name not in SECRETS)
    if own:
        option = own[0].replace("_", "-")
        raise InputError(f"--{option} is an option of the embedded engine, not of vllm: leave it out")
    arguments = ["serve", model]
    for name in ARGUMENTS:
        if name in options:
            arguments += [ARGUMENTS[name], str(options[name])]
    return arguments


def exec_vllm(model: str, options: Mapping[str, object], api_key: str | None, further: Sequence[str] = ()) -> None:
    """Become `vllm serve`, bound to 127.0.0.1 unless another host was set; does not return.

    Raises:
        InputError: vllm is not installed, or an option that it does not have.
    """
    arguments = [*vllm_arguments(model, {"host": "127.0.0.1", "port": 8000, **options}), *further]
    program = shutil.which("vllm")
    if program is None:
        raise InputError("--engine vllm: vllm is not installed here; pip install vllm, or leave --engine out")
    for name, value in {**options, "api_key": api_key}.items():
        if name in SECRETS and value is not None:
            os.environ[SECRETS[name]] = str(value)
    os.execv(program, ["vllm", *arguments])
