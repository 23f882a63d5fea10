"""The devices that a plan can be made for: the packaged table, a user's own, and this machine's CPU as it measures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from linearize.errors import InputError, unknown
from linearize.memory import resident_bytes
from linearize.numbers import Number, parse_size, size_text
from linearize.storage.files import read_text
from linearize.training.memory_simulation import Operation
from linearize.training.step import bf16_pays

CPU = "cpu"
CPU_SHARE = 0.6
CPU_LAUNCH = 1e-5
CPU_HEAP = 0.35  # measured between 0.2 and 0.5: docs/plan.md
CPU_BESIDE = 60_000_000
NODE = 8  # devices that `link` joins
Bytes = Annotated[int, BeforeValidator(parse_size)]
Rate = Annotated[Number, Field(gt=0)]


class Device(BaseModel):
    """One device: bytes, operations and bytes per second at their peaks, and the share of the peaks that is reached.

    `link`, `link_between_nodes`: bytes per second that one device receives from others of its node, and from other
    nodes; `link_share` of them is reached. `heap`: freed memory that the allocator keeps, as a share of the
    activations; `beside`: bytes of text, tokenizer and code that a conversion loads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: Bytes
    reserve: Bytes
    flops_bf16: Rate
    flops_fp32: Rate
    bandwidth: Rate
    share: Annotated[float, Field(gt=0, le=1)]
    launch: Annotated[Number, Field(ge=0)] = 0.0
    kind: str = "cuda"
    link: Rate | None = None
    link_between_nodes: Rate | None = None
    link_share: Annotated[float, Field(gt=0, le=1)] = 0.6
    heap: Annotated[Number, Field(ge=0)] = 0.0
    beside: Bytes = 0

    def gather_seconds(self, size: float, devices: int) -> float:
        """Seconds until each device has all of `size` bytes, of which it has a part; also those of summing gradients.

        Within a node each device receives what it lacks; all of a node's devices together bring in what other nodes
        hold. The slower of the two counts; 0 where the table has no `link`.
        """
        if devices == 1 or self.link is None:
            return 0.0
        nodes = -(-devices // NODE)
        inside = size * (devices - 1) / devices / self.link
        across = size * (nodes - 1) / nodes / (NODE * (self.link_between_nodes or self.link))
        return max(inside, across) / self.link_share

    def seconds(self, operations: Sequence[Operation]) -> float:
        """Seconds of operations one after the other, each the longest of its products, its bytes and its launch."""
        return sum(max(self._products(one), one.moved / (self.bandwidth * self.share), self.launch)
                   for one in operations)  # fmt: skip

    def _products(self, one: Operation) -> float:
        return one.flops / ((self.flops_bf16 if one.itemsize < 4 else self.flops_fp32) * self.share)


def load_device(name: str, table: str | Path | None = None) -> Device:
    """A device of the packaged table, of the YAML file `table`, or `cpu`: this machine, measured.

    Raises:
        InputError: an unknown name, or a table that cannot be used.
    """
    known = _parse((files("linearize.planning") / "devices.yaml").read_text("utf-8"), "the packaged table")
    if table is not None:
        known |= _parse(read_text(Path(table)), str(table))
    if name in known:
        return known[name]
    if name == CPU:
        return this_cpu()
    raise InputError(f"{unknown('device', name, [*known, CPU])} (--table FILE adds others)")


def this_cpu() -> Device:
    """This machine: memory that a process may have, products and copies of half a second's measuring."""
    fp32 = _rate(torch.float32)
    bf16 = _rate(torch.bfloat16) if bf16_pays(torch.device(CPU)) else fp32
    source, target = torch.ones(2**24), torch.empty(2**24)
    copies = 2 * source.nbytes / _seconds(lambda: target.copy_(source))
    return Device(
        memory=machine_memory(), reserve=resident_bytes() or 1, flops_bf16=bf16, flops_fp32=fp32, bandwidth=copies,
        share=CPU_SHARE, launch=CPU_LAUNCH, kind=CPU, heap=CPU_HEAP, beside=CPU_BESIDE,
    )  # fmt: skip


def _rate(dtype: torch.dtype, size: int = 768) -> float:
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / _seconds(lambda: a @ b)


def _seconds(work: Callable[[], Any]) -> float:
    """The shortest of five runs, in seconds."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def machine_memory() -> int:
    """Bytes of this machine, or of the control group that the process is in."""
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            bounds.append(int(Path(limit).read_text("ascii")))
        except (OSError, ValueError):
            continue
    return min(bounds)


def _parse(text: str, where: str) -> dict[str, Device]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{where}: a table of devices maps names to {', '.join(Device.model_fields)}")
    devices = {}
    for name, fields in data.items():
        try:
            devices[str(name)] = Device.model_validate(fields)
        except (ValidationError, InputError) as error:
            fault = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            key = ".".join(map(str, (name, *fault["loc"])))
            raise InputError(
                f"{where}: {key}: {fault['msg']}; a device has {', '.join(Device.model_fields)}"
            ) from error
    return devices


def fits(device: Device, need: int) -> str | None:
    """None if the device has this many bytes, else a message with what is missing."""
    available = device.memory
    return None if need <= available else f"needs {size_text(need)} of memory ({size_text(available)} available)"
