"""`linearize plan` for a frozen teacher in 8 or 4 bits, compared with bitsandbytes' own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan import LLAMAS, SHORT, config_folder

from linearize.errors import InputError
from linearize.modeling.io.quantized import BaseWeights, parts_of
from linearize.planning import ConversionPlan, plan_conversion
from linearize.planning.costs import quantized_weight_bytes

LAYER_NUMBERS = 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336)  # of the linear layers of 8B
ADAPTED = 32 * 4096 * (4096 * 2 + 1024 * 2)
PRODUCT = 2 * 4096 * 14336


def plan_of(folder: Path, base: str, **more: Any) -> ConversionPlan:
    settings = {**SHORT, "base_weights": base, "stages.0.tokens": 0}
    return plan_conversion(folder, recipe="lolcats", overrides=settings, device="A100-40", **more)


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config_folder(tmp_path_factory.mktemp("plans") / "8b", **LLAMAS["8b"])


@pytest.fixture(scope="module")
def full(llama_8b: Path) -> ConversionPlan:
    return plan_of(llama_8b, "full")


@pytest.mark.slow
@pytest.mark.parametrize(("base", "kept"), [("8bit", 0.5), ("4bit", 0.258)])
def test_rounded_layers_take_a_part_of_their_memory(
    base: BaseWeights, kept: float, full: ConversionPlan, llama_8b: Path
) -> None:
    rounded = plan_of(llama_8b, base)
    saved = 2 * LAYER_NUMBERS * (1 - kept)
    (before,), (after,) = full.stages, rounded.stages
    assert before.memory.weights - after.memory.weights == pytest.approx(saved, rel=2e-3)
    assert after.memory.activations == before.memory.activations + PRODUCT
    assert (after.flops, after.trained_parameters) == (before.flops, before.trained_parameters)
    whole_again = 2 * ADAPTED * (1 - kept)
    assert full.measuring_bytes - rounded.measuring_bytes == pytest.approx(saved - whole_again - PRODUCT, rel=2e-3)
    assert rounded.student_bytes == full.student_bytes, "the student is whole"


def test_what_convert_refuses_plan_refuses(llama_8b: Path) -> None:
    with pytest.raises(InputError, match="2 cannot share them"):
        plan_of(llama_8b, "4bit", devices=2)
    with pytest.raises(InputError, match="without blocks"):
        plan_conversion(
            llama_8b, recipe="lolcats", overrides={**SHORT, "base_weights": "8bit", "stages.0.block": 1}, device="H200"
        )


def test_nf4_takes_what_is_counted() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for outputs, inputs in ((64, 96), (200, 192), (72, 512)):
        layer = bitsandbytes.nn.Linear4bit(
            inputs, outputs, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32
        )
        parts = parts_of(layer.to("cpu").weight)
        held = sum(part.nbytes for name, part in parts.items() if name not in ("code", "nested_code", "offset"))
        assert held == quantized_weight_bytes(outputs, inputs, 4, "4bit")
