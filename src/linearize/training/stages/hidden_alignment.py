"""Hidden-state alignment: each converted layer learns the teacher's output on the teacher's own input
(MOHAWK stage 2, 2408.10189, section 4.2; RADLADS step 1, 2505.03005).

No error accumulates from layer to layer, and only the mixers' parameters train.

Letters: B batch, T tokens, M model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.attention import MixerCall
from linearize.modeling.truncate import block_name
from linearize.ops.layout import Layout
from linearize.training.config import Batch, BlockwiseConfig, LossSum, ParameterGroup, StageRun
from linearize.training.stages.chunked_logits import without_head
from linearize.training.stages.losses import counted
from linearize.training.student_run import StudentRun, unshare


class HiddenAlignmentConfig(BlockwiseConfig):
    """Settings of the stage.

    `output`: whose output is compared: `mixer` (the attention module's, output projection included) or `block` (the
    whole decoder layer's). `normalize`: `power` divides a layer's squared error by the mean square of what the teacher
    adds there (measured once, before the stage), so that late layers do not drown the others; `none` is raw.
    """

    by_layer: ClassVar[bool] = True
    name: Literal["hidden_alignment"] = "hidden_alignment"
    output: Literal["mixer", "block"] = "mixer"
    normalize: Literal["power", "none"] = "power"

    def check(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> None:
        """Raises: InputError: no mixer has parameters."""
        if not student.mixer_parameters():
            raise InputError(
                "hidden_alignment has nothing to train: no mixer of the plan has parameters (set its tokens to 0)"
            )

    def build(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> StageRun:
        """The stage over a student and its teacher."""
        self.check(student, teacher)
        return HiddenAlignment(self, student, teacher)


class HiddenAlignment(StudentRun):
    """The running stage."""

    def __init__(self, config: HiddenAlignmentConfig, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> None:
        super().__init__(student, ParameterGroup(unshare(student, teacher, student.mixer_parameters())))
        self.config, self.teacher = config, teacher
        learning = [layer for layer, mixer in sorted(student.mixers().items()) if list(mixer.parameters())]
        sites = {layer: student.config.attention[layer] for layer in learning}
        self.modules = {i: site if config.output == "mixer" else block_name(site) for i, site in sites.items()}
        self.power = dict.fromkeys(self.modules, 1.0)

    def calibrate(self, batch: Batch) -> None:
        """Measure on a batch of training text how much the teacher adds in each layer."""
        if self.config.normalize == "power":
            live = counted(batch["labels"])
            calls = module_calls(self.teacher, batch, self.modules.values())
            for layer, name in self.modules.items():
                self.power[layer] = float(self._added(calls[name])[live].float().square().mean())

    def loss(self, batch: Batch) -> LossSum:
        """Sum over layers of the mean squared error over the width, as a sum over tokens whose next token counts."""
        live = counted(batch["labels"])
        total = torch.zeros((), device=live.device)
        for layer, (output, call) in self._outputs(batch).items():
            error_BT = (output.float() - call.output.float()).square().mean(-1)
            total = total + error_BT[live].sum() / self.power[layer]
        return LossSum(total, float(live.sum()))

    @torch.no_grad()
    def layer_errors(self, batch: Batch) -> list[float]:
        """Per layer: squared error of the output over the power of what the teacher adds (0 exact, 1 as bad as
        nothing)."""
        live = counted(batch["labels"])
        return [
            float((output - call.output)[live].square().sum() / self._added(call)[live].square().sum())
            for output, call in self._outputs(batch).values()
        ]

    def _outputs(self, batch: Batch) -> dict[int, tuple[Tensor, ModuleCall]]:
        """For each layer, the student's output on the teacher's input, and the teacher's call."""
        calls, layout = module_calls(self.teacher, batch, self.modules.values()), batch_layout(batch)
        lm: nn.Module = self.student.lm
        return {
            layer: (calls[name].repeat(lm.get_submodule(name), layout), calls[name])
            for layer, name in self.modules.items()
        }

    def _added(self, call: ModuleCall) -> Tensor:
        """What the teacher's module adds to the hidden states; a block's output includes its input."""
        return call.output - call.hidden if self.config.output == "block" else call.output


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """Inputs and output of a module of the teacher, without a cache; `hidden`, `output`: `[B, T, M]`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def hidden(self) -> Tensor:
        """The hidden states among the inputs."""
        hidden: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def repeat(self, module: nn.Module, layout: Layout) -> Tensor:
        """The output of a student's module of the same name on the same input."""
        return _tensor(module(*self.args, **{**self.kwargs, "mixer_call": MixerCall(layout)}))


@torch.no_grad()
def module_calls(teacher: nn.Module, batch: Batch, names: Iterable[str]) -> dict[str, ModuleCall]:
    """Run a teacher over a batch; the calls of its modules of these names. The teacher is unchanged."""
    calls: dict[str, ModuleCall] = {}

    def writer(name: str) -> Any:
        def write(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = ModuleCall(args, kwargs, _tensor(output))

        return write

    hooks = [teacher.get_submodule(name).register_forward_hook(writer(name), with_kwargs=True) for name in names]
    try:
        with without_head(teacher):
            teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def batch_layout(batch: Batch) -> Layout:
    """The layout of a batch."""
    tokens = batch["input_ids"].shape[1]
    return Layout.from_inputs(num_tokens=tokens, past=0, position_ids=batch["position_ids"])


def _tensor(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
