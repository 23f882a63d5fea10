"""Which layers of a student the adapters of peft reach.

A mixer that replaces the attention module has projections with names of its own (`qkv_proj`, `in_proj`, `out_proj`), so
that `target_modules=["q_proj", "v_proj"]` may adapt the kept layers alone, without an error from peft.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from linearize.errors import InputError
from linearize.modeling.student import LinearizedForCausalLM


@dataclass(frozen=True, kw_only=True)
class AdapterReach:
    """Names of the adapted modules in each layer, within its block (`self_attn.q_proj`): of the converted layers, and
    of those that keep softmax attention. As text: one line that says how many are reached."""

    converted: Mapping[int, tuple[str, ...]]
    kept: Mapping[int, tuple[str, ...]]

    @property
    def reached(self) -> tuple[int, ...]:
        """The converted layers with at least one adapter."""
        return tuple(layer for layer, names in self.converted.items() if names)

    def __str__(self) -> str:
        kept = sum(bool(names) for names in self.kept.values())
        text = f"adapters reach {len(self.reached)} of {len(self.converted)} converted layers"
        text += f" and {kept} of {len(self.kept)} kept ones" if self.kept else ""
        if missed := [str(layer) for layer in self.converted if layer not in self.reached]:
            text += f"; not layers {', '.join(missed)}"
        return text


def adapter_reach(model: nn.Module) -> AdapterReach:
    """The layers that the adapters in a model reach.

    Args:
        model: a student inside peft's wrapper (`get_peft_model`), or one that holds adapters itself.

    Raises:
        InputError: no student, or adapters that reach none of its converted layers.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    student = next((module for module in model.modules() if isinstance(module, LinearizedForCausalLM)), None)
    if student is None:
        raise InputError(f"{type(model).__name__} holds no student: give what get_peft_model makes of one")
    return reach_of(student, [name for name, module in student.named_modules() if isinstance(module, BaseTunerLayer)])


def reach_of(student: LinearizedForCausalLM, adapted: Iterable[str]) -> AdapterReach:
    """The layers of a student in which these modules are.

    Raises:
        InputError: the student has converted layers and none of them is reached.
    """
    names = list(adapted)
    within: dict[int, tuple[str, ...]] = {}
    for layer, site in enumerate(student.config.attention):
        block = f"lm.{site.rpartition('.')[0]}."
        within[layer] = tuple(name.removeprefix(block) for name in names if name.startswith(block))
    mixers = student.mixers()
    reach = AdapterReach(
        converted={layer: inside for layer, inside in within.items() if layer in mixers},
        kept={layer: inside for layer, inside in within.items() if layer not in mixers},
    )
    if mixers and not reach.reached:
        site = f"lm.{student.config.attention[min(mixers)].rpartition('.')[0]}."
        linear = {
            name.rpartition(".")[2]
            for name, module in student.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(site)
        }
        targets = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "no module"
        raise InputError(
            f"adapters on {targets} reach none of the {len(mixers)} converted layers: their linear layers are "
            f'{", ".join(sorted(linear))}; target some of them, or "all-linear"'
        )
    return reach
