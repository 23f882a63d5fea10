"""Steps recorded once per width and replayed: CUDA graphs, all in one pool of memory.

Letters: B batch, T tokens of a step, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearize.errors import one_line

WARM_UPS = 3
Step = Callable[[Tensor], Tensor]
Recorder = Callable[[Callable[[], Tensor], Callable[[], None]], tuple[Callable[[], object], Tensor]]


def recorder_for(device: torch.device) -> Recorder | None:
    """How steps on this device are recorded; None: they are not."""
    return CudaRecorder(device) if device.type == "cuda" else None


def weights_at(model: nn.Module) -> int:
    """Changes when the weights move, which what was recorded of a model does not survive."""
    return hash(tuple(parameter.data_ptr() for parameter in model.parameters()))


class CudaRecorder:
    """Records CUDA graphs; those of one recorder share their memory, so that only one of them may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor], restore: Callable[[], None]) -> tuple[Callable[[], object], Tensor]:
        """What replays `run`, and the output that a replay fills. `restore` undoes what a run does to memory."""
        with torch.cuda.device(self._device):
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    run()
                    restore()
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                output = run()
        return graph.replay, output


@dataclass(frozen=True, eq=False)
class _Recorded:
    replay: Callable[[], object]
    tokens_BT: Tensor
    output_BTV: Tensor


class Graphs:
    """What was recorded so far, by kind of step; without a recorder every step just runs."""

    def __init__(self, record: Recorder | None) -> None:
        self._record = record
        self._made: dict[Hashable, _Recorded] = {}

    def clear(self) -> None:
        """Forget all: memory has moved."""
        self._made = {}

    def run(self, kind: Hashable, tokens_BT: Tensor, step: Step, moving: Callable[[], list[Tensor]]) -> Tensor:
        """`step(tokens_BT)`, replayed where this kind of step was recorded, and recorded where it was not.

        `moving`: memory that steps change. Where a step cannot be recorded, all run as they are from then on, after one
        warning.
        """
        if self._record is None:
            return step(tokens_BT)
        if kind not in self._made:
            try:
                self._made[kind] = self._recorded(self._record, tokens_BT, step, moving())
            except RuntimeError as error:
                self._record = None
                output = step(tokens_BT)  # fails again where the step itself cannot run: nothing to warn of then
                warnings.warn(f"no graph could be recorded, decoding goes on without: {one_line(error)}", stacklevel=2)
                return output
        made = self._made[kind]
        made.tokens_BT.copy_(tokens_BT)
        made.replay()
        return made.output_BTV

    @staticmethod
    def _recorded(record: Recorder, tokens_BT: Tensor, step: Step, moving: list[Tensor]) -> _Recorded:
        before = [x.clone() for x in moving]

        def restore() -> None:
            for x, old in zip(moving, before, strict=True):
                x.copy_(old)

        with torch.inference_mode(False):
            tokens = tokens_BT.clone()
        try:
            replay, output = record(lambda: step(tokens), restore)
        finally:
            restore()
        return _Recorded(replay, tokens, output)
