"""Weights sharded over two processes: outputs and gradients of whole ones, one copy for teacher and student."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from many import together
from models import mixer, student_of, text, tiny
from torch import Tensor, nn

from linearize.errors import InputError
from linearize.mixers import MixerConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.parallel import add_part, decoder_layers, gathered, is_sharded, units_of, whole, whole_state
from linearize.modeling.sharding import Shards, set_shards
from linearize.modeling.truncate import truncate
from linearize.training.distributed import start

IDS = text(2, 11)
EQUAL = (
    "student", "base", "teacher", "mixer gradients", "copied", "all gradients", "changed", "teacher after",
    "state",
)  # fmt: skip


def models(family: str, draft: bool) -> dict[str, Any]:
    """A teacher and its student; a draft of two layers goes over a cut teacher."""
    torch.manual_seed(3)
    teacher = tiny(family).requires_grad_(False)
    base = truncate(teacher, [0, 2]) if draft else teacher
    plan: list[MixerConfig | None] = [mixer("lolcats"), mixer("mamba2")] + ([] if draft else [None])
    return {"student": student_of(base, plan), "base": base, "teacher": teacher}


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def loss(model: nn.Module) -> Tensor:
    result: Tensor = model(IDS, labels=IDS, use_cache=False).loss
    return result


def look(family: str, draft: bool) -> dict[str, Any]:
    """What a rank sees; differences are from the same models whole."""
    group, expected = start(), models(family, draft)
    shared = group.share(lambda: models(family, draft))
    student, teacher, base = shared["student"], shared["teacher"], shared["base"]
    results: dict[str, Any] = {"meta": {p.device.type for p in student.parameters()}}
    shards = Shards(torch.device("cpu"))
    shards.place([student, base, teacher])
    set_shards(student, shards)
    named, before = dict(student.named_parameters()), dict(expected["student"].named_parameters())
    results["held"] = sum((p.to_local() if is_sharded(p) else p).numel() for p in named.values())
    results["whole"] = sum(p.numel() for p in before.values())
    results["shared"] = len(shards.shared)
    with torch.no_grad():
        for name, model in shared.items():
            results[name] = largest(model(IDS).logits, expected[name](IDS).logits)
    results["mixer gradients"] = gradients(student, expected["student"], ".mixer.")
    unit, units = units_of(student)[0], units_of(expected["student"])[0]
    with whole(unit):
        results["copied"] = largest(next(unit.parameters()), next(units.parameters()))
    shards.separate(student.parameters())
    results["all gradients"] = gradients(student, expected["student"], "")
    name, weight = next((name, p) for name, p in named.items() if is_sharded(p))
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    add_part(weight, change)
    with torch.no_grad():
        before[name].add_(change)
        results["changed"] = largest(student(IDS).logits, expected["student"](IDS).logits)
        results["teacher after"] = largest(teacher(IDS).logits, models(family, draft)["teacher"](IDS).logits)
    state, saved = dict(whole_state(student)), expected["student"].state_dict()
    results["here"] = sum(value.numel() > 0 for value in state.values())
    results["state"] = max((largest(value, saved[key]) for key, value in state.items() if value.numel()), default=0.0)
    return results | {"names": len(saved)}


def gradients(model: nn.Module, expected: nn.Module, part: str) -> float:
    """The largest difference of a gradient; those of sharded weights are sums over the ranks."""
    for one in (model, expected):
        one.zero_grad()
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(part in name and parameter.is_floating_point())
        loss(one).backward()
    worst, whole = 0.0, dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (whole[name].grad is None), name
        if parameter.grad is not None:
            ranks = 2 if is_sharded(parameter) else 1
            worst = max(worst, largest(gathered(parameter.grad) / ranks, whole[name].grad))
            assert whole[name].grad.abs().max() > 0
    return worst


@pytest.mark.slow
@pytest.mark.parametrize(("family", "draft"), [("llama", False), ("gpt2", False), ("mixtral", False), ("qwen3", True)])
def test_outputs_and_gradients_are_those_of_whole_weights(family: str, draft: bool) -> None:
    for rank, result in enumerate(together(2, look, family, draft)):
        assert result is not None, "a rank died"
        assert result["meta"] == ({"cpu"} if rank == 0 else {"meta"})
        assert result["held"] < 0.85 * result["whole"] and result["shared"] >= 4
        for key in EQUAL:
            assert result[key] < 1e-6, key
        assert result["here"] == (result["names"] if rank == 0 else 0)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = tiny("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="its 7 layers do not lie in one list"):
        decoder_layers(model)


def test_units_are_attention_and_mlp_without_the_mixers() -> None:
    student: LinearizedForCausalLM = student_of(tiny("llama"), [mixer("lolcats"), mixer("mamba2"), None])
    names = {id(module): name for name, module in student.lm.named_modules()}
    assert [names[id(unit)] for unit in units_of(student)] == [
        "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.self_attn",
        "model.layers.2.mlp",
    ]  # fmt: skip
