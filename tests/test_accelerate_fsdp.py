"""A student under accelerate with FSDP2 on two CPU processes: losses and weights of one process."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from many import together
from models import mixer, student_of, text, tiny
from torch.distributed.tensor import DTensor

pytestmark = pytest.mark.slow
STEPS = 3


def sharded_with_accelerate(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any, Any]:
    """Accelerate's own FSDP2, which it chooses by itself on GPUs alone: here its state says so on CPUs."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    assert (accelerator.is_fsdp2, accelerator.num_processes) == (True, 2), accelerator.state
    model, optimizer = accelerator.prepare(model, optimizer)
    assert any("Shard" in str(getattr(parameter, "placements", "")) for parameter in model.parameters())
    return accelerator, model, optimizer


def train(sharded: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of a few steps on the same text, and the weights after them."""
    model: Any = student_of(tiny("llama", attention="sdpa"), [mixer("lolcats"), None, mixer("mamba2")]).train()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05)
    rows, accelerator = text(4, 11), None
    if sharded:
        accelerator, model, optimizer = sharded_with_accelerate(model, optimizer)
        rows = rows[int(os.environ["RANK"]) :: 2]
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        accelerator.backward(loss) if accelerator else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean") if accelerator else loss.detach()))
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    return losses, {name: x.detach().clone() for name, x in state.items()}


def train_together() -> tuple[list[float], dict[str, Any]]:
    losses, state = train(sharded=True)
    return losses, {name: tensor.tolist() for name, tensor in state.items()} if os.environ["RANK"] == "0" else {}


def test_two_processes_give_the_losses_and_weights_of_one() -> None:
    losses, weights = train(sharded=False)
    results = together(2, train_together)
    assert all(isinstance(result, tuple) for result in results), results
    for rank_losses, _ in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
    assert losses[0] - losses[-1] > 0.5, "it learns"
    sharded = results[0][1]
    assert set(sharded) == set(weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(torch.tensor(sharded[name]), tensor, rtol=1e-4, atol=1e-5)
