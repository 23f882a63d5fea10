"""The window + linear kernel: values in Triton's interpreter (fp32, fp16), building without a GPU (bf16).

The cases run in a process of their own, `triton_window_cases.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
from test_triton_multi_step import ROUNDING, case, needs_triton, run_cases

pytestmark = pytest.mark.slow

CASES = [
    "hedgehog, terraced, dead",
    "gain, sliding, shared, dead, fp16",
    "hedgehog, terraced, fp16",
    "t2r, sliding, documents",
    "exp, sliding, jumps",
    "exp, terraced, fresh",
    "elu, no window, documents",
    "window of one",
    "window alone, no tail",
]
IN_PLACE = ["in place, dead", "in place, documents", "cut"]


@pytest.fixture(scope="module")
def results(kernel_device: str) -> dict[str, Any]:
    return run_cases("triton_window_cases.py", kernel_device)


def judge(result: dict[str, float], dtype: str) -> None:
    """Outputs to a rounding, at most twice as far off as the PyTorch road; sums to fp32, keys and values equal."""
    assert result["y"] <= ROUNDING[dtype] and result["y"] <= max(2 * result["torch"], 5e-7), result
    assert result["state"] <= 5e-6 and result["rows"] == 0, result


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_advances_over_the_tail_and_gives_the_new_outputs(name: str, results: dict) -> None:
    judge(case(results, name), results["half dtype"] if "fp16" in name else "fp32")


@needs_triton
@pytest.mark.parametrize("name", IN_PLACE)
def test_buffers_are_written_in_place(name: str, results: dict) -> None:
    judge(case(results, name), "fp32")
    assert results[name]["in_place"] == 1


@needs_triton
@pytest.mark.parametrize("kind", ["terraced", "sliding", "in place"])
def test_a_document_that_begins_above_position_0_continues_in_the_next_call(kind: str, results: dict) -> None:
    numbers = case(results, f"across, {kind}")
    assert max(numbers["y"], numbers["other"]) < 2e-6 and numbers["begin"] == 0, numbers


@needs_triton
def test_no_bit_depends_on_where_a_text_is_cut_and_no_buffer_moves(results: dict) -> None:
    numbers = case(results, "same bits")
    assert numbers["differ"] == 0 and numbers["moved"] == 0 and numbers["spread"] > 0.1


@needs_triton
def test_each_branch_can_be_asked_for_alone(results: dict) -> None:
    numbers = case(results, "branches")
    assert max(numbers["window"], numbers["linear"], numbers["both"]) < 2e-6 and numbers["apart"] > 0.01


@needs_triton
def test_mixers_and_operation_take_their_kernels_by_name(results: dict) -> None:
    numbers = case(results, "dispatched")
    assert set(numbers) == {"window", "mamba", "mamba2", "gated_delta_net"} and max(numbers.values()) < 5e-6
