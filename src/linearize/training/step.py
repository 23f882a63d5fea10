"""One optimiser step: a loss that is divided once, over all micro-batches and ranks, and AdamW on named parameters."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from linearize.errors import InputError
from linearize.training.checkpoint import PARAMETER
from linearize.training.config import Batch, LossSum, StageConfig, StageRun


class StepNumbers(NamedTuple):
    """What a step tells: the mean loss before it, what that sum was divided by, and the gradient's norm unclipped."""

    loss: float
    counted: float
    gradient_norm: float


class Stepper:
    """AdamW over exactly the parameters that a run names, on one process or on every rank of torch.distributed."""

    def __init__(self, run: StageRun, config: StageConfig, *, alone: bool = False) -> None:
        """All ranks start from the first rank's parameters; `alone`: other ranks do something else. Raises `InputError`
        if they cannot share a batch evenly."""
        self.run, self.config = run, config
        together = dist.is_initialized() and not alone
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        if config.batch % self.ranks:
            raise InputError(
                f"batch {config.batch} of {config.name!r} does not divide by {self.ranks} ranks: change one"
            )
        groups = run.parameter_groups()
        self.parameters = {key: value for group in groups for key, value in group.parameters.items()}
        assert len(self.parameters) == sum(len(group.parameters) for group in groups), "a name in two groups"
        assert self.parameters, "a stage must train something"
        assert all(value.requires_grad for value in self.parameters.values()), "a frozen parameter is to be trained"
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            [{"params": list(group.parameters.values()), "lr_scale": group.lr_scale} for group in groups],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        if self.ranks > 1:
            for parameter in self.parameters.values():
                dist.broadcast(parameter.data, src=0)

    def step(self, batch: Batch, *, number: int, lr: float) -> StepNumbers | None:
        """Optimiser step `number` on this rank's rows; None, and nothing changes, if no token of any rank counts.

        Raises:
            RuntimeError: the loss or a gradient is not finite; the parameters are as before.
        """
        torch.manual_seed(derived_seed(self.config.seed, number, self.rank))
        where = f"at step {number + 1} of stage {self.config.name!r} (lr {lr:.3g})"
        try:
            total, count = self._accumulate(batch)
            if count == 0:
                return None
            check_finite(total, f"the loss {where}")
            norm = self._scale_gradients(count)
            check_finite(norm, f"the gradient {where}")
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return StepNumbers(loss=total / count, counted=count, gradient_norm=norm)

    @torch.no_grad()
    def heldout_loss(self, batches: Iterable[Batch]) -> float:
        """The run's mean held-out loss over the batches of all ranks. Raises `InputError` if nothing in them counts."""
        torch.manual_seed(derived_seed(self.config.seed, -1, self.rank))
        sums = self._pair(0.0, 0.0)
        for batch in batches:
            loss = self._forward(self.run.heldout_loss, batch)
            sums += self._pair(loss.sum, loss.count)
        self._reduce(sums)
        if sums[1] == 0:
            raise InputError(f"no held-out token of stage {self.config.name!r} counts: give more text or labels")
        return float(sums[0] / sums[1])

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state by name, for a checkpoint."""
        tensors: dict[str, Tensor] = {f"{PARAMETER}{key}": value for key, value in self.parameters.items()}
        for key, parameter in self.parameters.items():
            tensors |= {f"adamw.{part}/{key}": value for part, value in self.optimizer.state.get(parameter, {}).items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`; other names are left alone."""
        self.set_parameters({key: tensors[f"{PARAMETER}{key}"] for key in self.parameters})
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            if part.startswith("adamw."):
                moment = value if part == "adamw.step" else value.to(self.device)  # AdamW counts its steps on the CPU
                self.optimizer.state[self.parameters[key]][part.removeprefix("adamw.")] = moment

    @torch.no_grad()
    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Copies values into the parameters of the same names."""
        for key, value in values.items():
            self.parameters[key].copy_(value)

    def _accumulate(self, batch: Batch) -> tuple[float, float]:
        """Gradients of the *sum* of the loss over this rank's rows; returns sum and count over all ranks."""
        share = self.config.batch // self.ranks
        size = self.config.micro_batch or share
        assert all(len(value) == share for value in batch.values()), f"a batch must have {share} rows on each rank"
        sums = self._pair(0.0, 0.0)
        for start in range(0, share, size):
            loss = self._forward(self.run.loss, {key: value[start : start + size] for key, value in batch.items()})
            loss.sum.backward()
            sums += self._pair(loss.sum.detach(), loss.count)
        self._reduce(sums)
        return float(sums[0]), float(sums[1])

    def _scale_gradients(self, count: float) -> float:
        """Sums gradients over the ranks, divides once by the count of all, and clips; returns the norm before that."""
        gradients: list[Tensor] = []
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for gradient in gradients:
            self._reduce(gradient)
            gradient.div_(count)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.clip, norm)
        return float(norm)

    def _forward(self, loss: Callable[[Batch], LossSum], batch: Batch) -> LossSum:
        """A loss on the parameters' device, under autocast if the config says so."""
        batch = {key: value.to(self.device) for key, value in batch.items()}
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            return loss(batch)

    def _pair(self, total: Tensor | float, count: Tensor | float) -> Tensor:
        """Sum and count as fp64 `[2]` on the device."""
        return torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in (total, count)]
        )

    def _reduce(self, tensor: Tensor) -> None:
        """Sums in place over the ranks."""
        if self.ranks > 1:
            dist.all_reduce(tensor)


def derived_seed(seed: int, step: int, rank: int) -> int:
    """A seed for torch that depends on all three and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_finite(value: float, what: str) -> None:
    """Raises `RuntimeError` if a loss or a gradient norm is nan or infinite."""
    if not math.isfinite(value):
        raise RuntimeError(f"{what} is {value}: lower lr, lengthen warmup or lower clip")
