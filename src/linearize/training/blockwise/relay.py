"""Callbacks of blocks that several processes train: what happens anywhere is brought to the first process, which calls
them, and a stop is brought back to all."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict

import torch.distributed as dist

from linearize.training.blockwise.block_result import stage_result
from linearize.training.callbacks import Evaluation, Step, StopTraining, call_all
from linearize.training.distributed import Group, shared_store
from linearize.training.loop import StageResult

STOP = "stop"
_RUNS = itertools.count()  # conversions of these processes, which all of them count alike


class CallbackRelay:
    """The one callback of a block-wise stage on every process, in the place of the caller's.

    The first process calls the caller's for its own steps and, between them and while it waits, for those of the
    others, in the order of each process. Once one of them has returned True, each process stops after its next step.
    """

    def __init__(self, callbacks: Sequence[object], group: Group) -> None:
        self.callbacks, self.group = callbacks, group
        self.store = dist.PrefixStore(f"callbacks/{next(_RUNS)}", shared_store())
        self.sent = 0
        self.received = [0] * group.ranks

    def on_step(self, step: Step) -> bool:
        """A step of a block on this process."""
        return self._event("on_step", step)

    def on_evaluate(self, evaluation: Evaluation) -> bool:
        """The held-out loss of a block on this process."""
        return self._event("on_evaluate", evaluation)

    def on_stage_end(self, result: StageResult) -> bool:
        """A block is complete on this process."""
        return self._event("on_stage_end", result)

    def check(self) -> None:
        """Call the callbacks for what the others did. Raises StopTraining where one asked to stop."""
        if self.group.leads:
            self.receive()
        if self.stopped():
            raise StopTraining("between two blocks")

    def receive(self) -> None:
        """Call the callbacks, on the first process, for the events of the others that have come."""
        for rank in range(1, self.group.ranks):
            for number in range(self.received[rank], self.store.add(f"{rank}/sent", 0)):
                method, fields = json.loads(self.store.get(f"{rank}/{number}"))
                self.store.delete_key(f"{rank}/{number}")
                self.received[rank] = number + 1
                self._call(method, _event(method, fields))

    def stopped(self) -> bool:
        """Whether a callback has asked to stop."""
        return self.store.add(STOP, 0) > 0

    def _event(self, method: str, event: Step | Evaluation | StageResult) -> bool:
        if self.group.leads:
            self._call(method, event)
            self.receive()
        else:
            self.store.set(f"{self.group.rank}/{self.sent}", json.dumps([method, asdict(event)]))
            self.sent += 1
            self.store.add(f"{self.group.rank}/sent", 1)
        return self.stopped()

    def _call(self, method: str, event: Step | Evaluation | StageResult) -> None:
        if call_all(self.callbacks, method, event):
            self.store.add(STOP, 1)


def _event(method: str, fields: dict[str, object]) -> Step | Evaluation | StageResult:
    if method == "on_stage_end":
        return stage_result(fields)
    return (Step if method == "on_step" else Evaluation)(**fields)  # type: ignore[arg-type]
