"""One optimiser step: a loss that is divided once, over all micro-batches and ranks, and AdamW on named parameters."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from linearize.errors import InputError
from linearize.modeling.parallel import gathered, is_sharded, spread, sync_gradients
from linearize.ops.matmul import has_bf16_units
from linearize.training.checkpoint import PARAMETER
from linearize.training.config import NOTHING, Batch, LossSum, StageConfig, StageRun
from linearize.training.distributed import Group, current

Stage = TypeVar("Stage", bound=StageConfig)
BUCKET_NUMBERS = 2**24
"""Gradients are summed over the ranks so many numbers at a time (64 MiB in fp32)."""


class StepNumbers(NamedTuple):
    """The numbers of a step: the mean loss before it, the count that its sum was divided by, the gradient norm before
    clipping, and the means of the loss's further sums."""

    loss: float
    counted: float
    gradient_norm: float
    metrics: Mapping[str, float] = NOTHING

    def logged(self) -> dict[str, float]:
        """All of them by name."""
        own = {"loss": self.loss, "counted": self.counted, "gradient_norm": self.gradient_norm}
        return own | dict(self.metrics)


class Stepper:
    """AdamW over exactly the parameters that a run names, on one process or on every rank of torch.distributed.

    Parameters are whole on every rank, their gradients summed here; or sharded (`modeling/parallel.py`), each rank
    stepping its part of them with gradients that FSDP has summed.
    """

    def __init__(self, run: StageRun, config: StageConfig, *, alone: bool = False) -> None:
        """Broadcast the first rank's parameters. `alone`: other ranks do something else. Raises `InputError` if ranks
        cannot divide a batch evenly."""
        self.run, self.config = run, config
        self.group = Group() if alone else current()
        self.rank, self.ranks = self.group.rank, self.group.ranks
        if config.batch % self.ranks:
            raise InputError(
                f"batch {config.batch} of {config.name!r} is not divisible by {self.ranks} ranks: change one"
            )
        groups = run.parameter_groups()
        self.parameters = {key: value for group in groups for key, value in group.parameters.items()}
        assert len(self.parameters) == sum(len(group.parameters) for group in groups), "a name in two groups"
        assert self.parameters, "a stage must train something"
        assert all(value.requires_grad for value in self.parameters.values()), "a frozen parameter is to be trained"
        self.device = next(iter(self.parameters.values())).device
        self.sharded = {key for key, value in self.parameters.items() if self.ranks > 1 and is_sharded(value)}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "lr_scale": group.lr_scale}
                for group in groups
                for parameters in _parted(group.parameters, self.sharded)
            ],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        if self.ranks > 1:
            for parameter in self._whole():
                dist.broadcast(parameter.data, src=0)

    def step(self, batch: Batch, *, number: int, lr: float) -> StepNumbers | None:
        """Optimiser step `number` on this rank's rows; None, and nothing changes, if no token of any rank counts.

        Raises:
            RuntimeError: the loss or a gradient is not finite; the parameters are as before.
        """
        torch.manual_seed(derived_seed(self.config.seed, number, self.rank))
        where = f"at step {number + 1} of stage {self.config.name!r} (lr {lr:.3g})"
        try:
            total, count, also = self._accumulate(batch)
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
        metrics = {name: value / count for name, value in also.items()}
        return StepNumbers(loss=total / count, counted=count, gradient_norm=norm, metrics=metrics)

    @torch.no_grad()
    def heldout_loss(self, batches: Sequence[Batch]) -> float:
        """The run's mean held-out loss over all batches, each measured by one of the ranks.

        All ranks run the same number of batches, since sharded weights are gathered together: who has none left runs
        the first one, which then does not count. Raises `InputError` if nothing in them counts.
        """
        torch.manual_seed(derived_seed(self.config.seed, -1, self.rank))
        sums = self._sums(0.0, 0.0)
        for number in range(self.rank, -(-len(batches) // self.ranks) * self.ranks, self.ranks):
            own = number < len(batches)
            loss = self._forward(self.run.heldout_loss, batches[number if own else 0])
            if own:
                sums += self._sums(loss.sum, loss.count)
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
        """The inverse of `tensors`; other names are ignored."""
        self.set_parameters({key: tensors[f"{PARAMETER}{key}"] for key in self.parameters})
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            if part.startswith("adamw."):
                moment = value if part == "adamw.step" else self.placed(key, value)  # AdamW counts steps on the CPU
                self.optimizer.state[self.parameters[key]][part.removeprefix("adamw.")] = moment

    @torch.no_grad()
    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters of the same names."""
        for key, value in values.items():
            self.parameters[key].copy_(self.placed(key, value))

    def _accumulate(self, batch: Batch) -> tuple[float, float, dict[str, float]]:
        """Gradients of the *sum* of the loss over this rank's rows; returns sum, count and more sums of all ranks."""
        share = self.config.batch // self.ranks
        size = self.config.micro_batch or share
        assert all(len(value) == share for value in batch.values()), f"a batch must have {share} rows on each rank"
        parts, names = [], NOTHING.keys()
        for start in range(0, share, size):
            if self.sharded:
                sync_gradients(self.run.student, start + size >= share)  # type: ignore[attr-defined]
            loss = self._forward(self.run.loss, {key: value[start : start + size] for key, value in batch.items()})
            loss.sum.backward()
            names = loss.also.keys()
            parts.append(self._sums(loss.sum.detach(), loss.count, *loss.also.values()))
        sums = torch.stack(parts).sum(0)
        self._reduce(sums)
        total, count, *also = sums.tolist()
        return total, count, dict(zip(names, also, strict=True))

    def _scale_gradients(self, count: float) -> float:
        """Sum gradients over the ranks, divide once by the total count, and clip; return the norm before clipping."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.ranks > 1:
            sum_over_ranks([parameter.grad for parameter in self._whole() if parameter.grad is not None])
        kinds = [list(kind) for kind in _parted(self.parameters, self.sharded)]
        norms = []
        for kind in kinds:
            gradients = [parameter.grad for parameter in kind if parameter.grad is not None]
            for gradient in gradients:
                gradient.div_(count)
            norms.append(gathered(torch.nn.utils.get_total_norm(gradients)))
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        if self.config.clip is not None:
            for kind in kinds:
                torch.nn.utils.clip_grads_with_norm_(kind, self.config.clip, norm)
        return float(norm)

    def _forward(self, loss: Callable[[Batch], LossSum], batch: Batch) -> LossSum:
        """Compute a loss on the parameters' device, under autocast if the config asks for it."""
        batch = {key: value.to(self.device) for key, value in batch.items()}
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            return loss(batch)

    def _whole(self) -> list[Tensor]:
        """The parameters that every rank holds whole."""
        return [value for key, value in self.parameters.items() if key not in self.sharded]

    def placed(self, key: str, value: Tensor) -> Tensor:
        """A value for a parameter, on its device and sharded as it is."""
        return spread(value, self.parameters[key]) if key in self.sharded else value.to(self.device)

    def _sums(self, *values: Tensor | float) -> Tensor:
        """Sum, count and further sums, as fp64 on the device."""
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])

    def _reduce(self, tensor: Tensor) -> None:
        """Sum in place over the ranks."""
        if self.ranks > 1:
            dist.all_reduce(tensor)


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor in place over the ranks, small ones together; half precision is summed in fp32."""
    for bucket in _buckets(tensors):
        exact = torch.float32 if bucket[0].dtype in (torch.float16, torch.bfloat16) else bucket[0].dtype
        flat = torch.cat([tensor.reshape(-1).to(exact) for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(total.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, in portions of `BUCKET_NUMBERS` or a single larger one."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        numbers = sum(pending.numel() for pending in bucket) + tensor.numel()
        if bucket and (tensor.dtype != bucket[0].dtype or numbers > BUCKET_NUMBERS):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _parted(parameters: Mapping[str, Tensor], sharded: set[str]) -> list[list[Tensor]]:
    """Whole parameters and sharded ones, which no operation can mix; one list if all are of one kind."""
    kinds = ([value for key, value in parameters.items() if (key in sharded) == whether] for whether in (False, True))
    return [kind for kind in kinds if kind]


def derived_seed(seed: int, step: int, rank: int) -> int:
    """A seed for torch that depends on all three and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_finite(value: float, what: str, *, trained: bool = True) -> None:
    """Raises `RuntimeError` if a loss or a gradient norm is nan or infinite; `trained`: whether a step was taken."""
    if not math.isfinite(value):
        untrained = "no step was taken, so training is not to blame: look at the model and the text that it starts from"
        raise RuntimeError(f"{what} is {value}: {'lower lr, lengthen warmup or lower clip' if trained else untrained}")


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones: on any accelerator, and see `has_bf16_units` for CPUs."""
    if device.type != "cpu":
        return True
    return has_bf16_units()


def computed_on(stage: Stage, device: torch.device) -> Stage:
    """The stage as it is computed on a device: in fp32 where bf16 would be slower."""
    if stage.precision == "fp32" or bf16_pays(device):
        return stage
    return stage.model_copy(update={"precision": "fp32"})
