"""What `linearize doctor` looks at: libraries, devices, backends and extras.

Each is looked at by itself, and no library is needed for the others: what is broken becomes a line, not a traceback.
"""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.errors import one_line
from linearize.version import TRIED, __version__

if TYPE_CHECKING:
    from packaging.requirements import Requirement

BRINGS = {
    "eval": "tasks of lm-eval, a judge of chat answers",
    "gpu": "Triton kernels, flash-linear-attention",
    "serve": "a server",
    "vllm": "vLLM",
    "gguf": "GGUF teachers",
    "quant": "frozen weights in 8 or 4 bits (--base)",
    "track": "TensorBoard, Weights & Biases (--track)",
}
FOR_DEVELOPERS = ("dev", "docs")
OK, MISSING, UNTRIED = "ok", "missing", "not tested"


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library that linearize needs; `needed` is the range of versions."""

    name: str
    installed: str | None
    needed: str
    status: str


@dataclass(frozen=True, kw_only=True)
class Extra:
    """An extra; `missing` are its requirements that are not met, `install` the command that brings them."""

    name: str
    brings: str
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """A device, its memory and what of it is free, in bytes."""

    device: str
    name: str
    memory: int
    free: int


@dataclass(kw_only=True)
class Diagnosis:
    """The installation. `problems` keep linearize from working, `notes` do not; each is one line with what to do."""

    linearize: str = __version__
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=platform.platform)
    folder: str = field(default_factory=lambda: str(Path(__file__).resolve().parents[1]))
    libraries: list[Library] = field(default_factory=list)
    devices: list[DeviceState] = field(default_factory=list)
    backends: list[dict[str, str]] = field(default_factory=list)
    extras: list[Extra] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def diagnose() -> Diagnosis:
    """Look at everything; takes a few seconds, as torch and transformers are imported."""
    diagnosis = Diagnosis()
    _check_requirements(diagnosis)
    broken = [problem for name in ("torch", "transformers", "linearize.modeling") if (problem := _import(name))]
    diagnosis.problems += broken[:1]  # the others follow from it
    if not broken:
        _check_devices(diagnosis)
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        diagnosis.notes.append("no C++ compiler: `generate --compile` needs one (g++ or clang++)")
    return diagnosis


def pip_line(requirements: list[str]) -> str:
    """The command that installs these into this Python."""
    pip = shutil.which("pip")
    own = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return " ".join(["pip" if own else f"{shlex.quote(sys.executable)} -m pip", "install", *map(_quoted, requirements)])


def _quoted(requirement: str) -> str:
    return f"'{requirement}'" if set("<>[]; ") & set(requirement) else requirement


def _check_requirements(diagnosis: Diagnosis) -> None:
    """Libraries and extras, as the installed package declares them."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        diagnosis.problems.append(f"packaging is not installed, which transformers needs: {pip_line(['packaging'])}")
        return
    try:
        package = distribution("linearize")
    except PackageNotFoundError:
        diagnosis.notes.append(
            f"linearize runs from {diagnosis.folder} and is not installed: libraries and extras are unknown"
        )
        return
    requirements = [Requirement(text) for text in package.requires or ()]
    for requirement in _of(requirements, ""):
        library = _library(requirement)
        diagnosis.libraries.append(library)
        if library.status == UNTRIED:
            diagnosis.notes.append(f"{library.name} {library.installed} is not tested: results may be wrong")
        elif library.status != OK:
            diagnosis.problems.append(f"{library.name}: {library.status}: {pip_line([_text(requirement)])}")
    for name in sorted(set(package.metadata.get_all("Provides-Extra") or ()) - set(FOR_DEVELOPERS)):
        missing = [_text(each) for each in _of(requirements, name) if _library(each).status not in (OK, UNTRIED)]
        install = pip_line(missing) if missing else ""
        diagnosis.extras.append(Extra(name=name, brings=BRINGS.get(name, ""), missing=tuple(missing), install=install))


def _of(requirements: list[Requirement], extra: str) -> Iterator[Requirement]:
    """The requirements of an extra on this machine; `""`: those of linearize itself."""
    for requirement in requirements:
        marker = requirement.marker
        if not extra:
            if marker is None or marker.evaluate({"extra": ""}):
                yield requirement
        elif marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield requirement


def _text(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _library(requirement: Requirement) -> Library:
    """What is installed of a requirement, and whether it will do."""
    needed = str(requirement.specifier)
    try:
        installed: str | None = version(requirement.name)
    except PackageNotFoundError:
        installed = None
    if installed is None:
        status = MISSING
    elif not requirement.specifier.contains(installed, prereleases=True):
        status = f"{installed} is installed, {needed} is needed"
    else:
        status = UNTRIED if _is_untried(requirement.name) else OK
    return Library(name=requirement.name, installed=installed, needed=needed, status=status)


def _is_untried(name: str) -> bool:
    from linearize.version import untried

    return name in TRIED and untried(name, *TRIED[name]) is not None


def _import(name: str) -> str | None:
    """The problem with a module that does not import, or None."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{name} does not import ({type(error).__name__}: {one_line(error)}): install it again"
    return None


def _check_devices(diagnosis: Diagnosis) -> None:
    """Devices, each with a product that it computed, and the backends on the first choice."""
    import torch

    from linearize.conversion.sizes import free_memory
    from linearize.metrics.report import hardware
    from linearize.modeling.inspect import all_backends
    from linearize.planning.devices import machine_memory

    machine = hardware()
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    diagnosis.devices.append(DeviceState(device="cpu", name=cpu, memory=machine_memory(), free=free_memory()))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, memory = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        diagnosis.devices.append(DeviceState(device=f"cuda:{index}", name=name, memory=memory, free=free))
    for state in diagnosis.devices:
        if problem := _computes(state.device):
            diagnosis.problems.append(
                f"{state.device} does not compute ({problem}): check its driver and torch's build"
            )
    if len(diagnosis.devices) == 1 and Path("/dev/nvidia0").exists():
        diagnosis.notes.append(
            f"there is an NVIDIA GPU, and torch {torch.__version__} cannot use it: install a build of torch for CUDA"
        )
    gpu = len(diagnosis.devices) > 1
    diagnosis.backends = all_backends("cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32)


def _computes(device: str) -> str | None:
    """What is wrong with a small product on a device, or None."""
    import torch

    try:
        total = float((torch.ones(3, 5, device=device) @ torch.ones(5, 7, device=device)).sum())
    except Exception as error:
        return one_line(error)
    return None if total == 105.0 else f"a sum of 105 is {total} there"
