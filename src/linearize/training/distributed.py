"""Several processes that work together: joined as torchrun (or srun) started them, and numbered by rank.

Only rank 0 reads, prints and writes. It sends what it prepared to the others, with parameters that have shapes and no
values (`modeling/parallel.py` sends those). An error on any rank ends all of them with one line.
"""

from __future__ import annotations

import io
import os
import pickle
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from linearize.errors import InputError
from linearize.memory import return_large_blocks

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""Timeout of a collective: rank 0 may sample text for days; a dead process is noticed by its closed connection."""
LEAVING_SECONDS = 10.0
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_store: dist.Store | None = None


class FailedElsewhereError(RuntimeError):
    """The work failed on another rank, which prints why."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The group of processes and this one's rank; a single process is rank 0 of 1."""

    rank: int = 0
    ranks: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that reads, prints and writes."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """Return the result of `make` on rank 0 to every rank; parameters (`nn.Parameter`) arrive on the meta device.

        Which modules share a parameter is kept. Raises what `make` raises, on other ranks `FailedElsewhereError`.
        """
        if self.ranks == 1:
            return make()
        if not self.leads:
            return cast(T, _received())
        try:
            value = make()
        except BaseException:
            _send(b"")
            raise
        _send(_packed(value))
        return value

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare what every rank knows under the same names.

        Raises:
            InputError: on every rank, if one of them knows something else; names what.
        """
        if self.ranks == 1:
            return
        known: list[Any] = [None] * self.ranks
        dist.all_gather_object(known, dict(facts))
        for rank, other in enumerate(known):
            if wrong := [name for name in known[0] if other.get(name) != known[0][name]]:
                name = wrong[0]
                raise InputError(
                    f"the processes do not have the same {name}: process 0 has {known[0][name]}, process {rank} has "
                    f"{other.get(name)}: start all of them with the same command, files and versions"
                )

    def wait(self) -> None:
        """Wait for every rank."""
        if self.ranks > 1:
            dist.barrier()


def current() -> Group:
    """The current group; joins nothing."""
    if dist.is_available() and dist.is_initialized():
        return Group(rank=dist.get_rank(), ranks=dist.get_world_size())
    return Group()


def shared_store() -> dist.Store:
    """The store of the processes that `start` joined."""
    assert _store is not None, "start() comes first"
    return dist.PrefixStore("linearize", _store)


def is_one_of_many() -> bool:
    """Whether torchrun started this process together with others."""
    return all(name in os.environ for name in ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


def start() -> Group:
    """Join the processes that torchrun started together with this one: gloo on CPUs, NCCL on CUDA devices, of which
    each process takes that of its local rank. Does nothing for a process alone, and nothing twice."""
    global _store
    if dist.is_initialized() or not is_one_of_many():
        return current()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    else:
        return_large_blocks()  # weights are whole for a moment, in the memory that holds the parts
    _store, rank, ranks = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=10))))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("linearize", _store),
        rank=rank,
        world_size=ranks,
        timeout=PATIENCE,
    )
    return current()


def stop() -> None:
    """Leave the group."""
    global _store
    _store = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def outcome(error: BaseException, code: int) -> tuple[bool, int]:
    """Whether this process prints its error, and the exit code of all of them.

    The first that fails prints; it leaves the group, which wakes the others, and gives them time to end.
    """
    if _store is None:
        return True, code
    store, rank, ranks = _store, dist.get_rank(), dist.get_world_size()
    store.set_timeout(timedelta(seconds=LEAVING_SECONDS))
    with suppress(RuntimeError):
        first = not isinstance(error, FailedElsewhereError) and store.add("linearize/failed", 1) == 1
        if first:
            store.set("linearize/code", str(code))
        else:
            code = int(store.get("linearize/code"))
        stop()
        left = store.add("linearize/left", 1)
        end = time.monotonic() + LEAVING_SECONDS
        while (first or rank == 0) and left < ranks and time.monotonic() < end:  # rank 0 may hold the store
            time.sleep(0.05)
            left = store.add("linearize/left", 0)
        return first, code
    return not isinstance(error, FailedElsewhereError), code


class _Packer(pickle.Pickler):
    """Parameters without their values."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.seen: dict[int, nn.Parameter] = {}  # keeps them alive, so that ids stay theirs

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, nn.Parameter):
            return None
        self.seen[id(obj)] = obj
        return id(obj), tuple(obj.shape), obj.dtype, obj.requires_grad


class _Unpacker(pickle.Unpickler):
    """Parameters on the meta device, one for each that was packed."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.made: dict[int, nn.Parameter] = {}

    def persistent_load(self, pid: Any) -> nn.Parameter:
        key, shape, dtype, requires_grad = pid
        if key not in self.made:
            self.made[key] = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)
        return self.made[key]


def _packed(value: object) -> bytes:
    file = io.BytesIO()
    _Packer(file).dump(value)
    return file.getvalue()


def _send(data: bytes) -> None:
    """Send bytes to all other ranks; None signals an error."""
    dist.broadcast(torch.tensor([len(data)]), src=0)
    if data:
        dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), src=0)


def _received() -> Any:
    length = torch.zeros(1, dtype=torch.long)
    dist.broadcast(length, src=0)
    if length.item() == 0:
        raise FailedElsewhereError("the first process failed")
    data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return _Unpacker(io.BytesIO(data.numpy().tobytes())).load()
