"""The kernels of window + linear attention: values and gradients in Triton's interpreter against the equation in fp64.

The interpreter is chosen when triton is imported, so the cases run in a process of their own:
`triton_window_chunks_cases.py`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_triton_multi_step import run_cases

from linearize.ops.window_linear import WindowLinear
from linearize.ops.window_linear.backends import WindowCall, choice

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (the extra `gpu`, Linux)"),
]
EXACT = 1e-5  # relative to fp64; sums of fp32 in another order differ by 3e-6
HALF = {"fp16": 4e-3, "bf16": 3e-2}  # a sum of such numbers of both signs


@pytest.fixture(scope="module")
def results(kernel_device: str) -> dict[str, Any]:
    return run_cases("triton_window_chunks_cases.py", kernel_device)


def errors(results: dict[str, Any], name: str) -> dict[str, float]:
    result: dict[str, float] = results[name]
    assert "error" not in result, result["error"]
    return result


WHOLE = [
    "blocks",
    "beyond",
    "given features",
    "no window",
    "window alone",
    "above 0",
    "parts",
    "given parts",
    "queries in tiles",
]


@pytest.mark.parametrize("name", WHOLE)
def test_outputs_and_all_gradients_are_those_of_the_equation(name: str, results: dict) -> None:
    result = errors(results, name)
    assert len(result) >= 8 and max(result.values()) < EXACT, result


@pytest.mark.parametrize("name", ["two calls", "above 0, two calls"])
def test_prefill_in_two_chunks_continues_from_the_state(name: str, results: dict) -> None:
    assert max(errors(results, name).values()) < EXACT


def test_half_precision_is_as_near_as_its_rounding(results: dict) -> None:
    result = errors(results, "half")
    most = HALF[results["half dtype"]]
    assert max(result.values()) < most and result["y"] < most / 4, result


@pytest.mark.parametrize(
    ("changed", "backend"),
    [
        ({}, "triton_chunks"),
        ({"gradients": True, "dtype": torch.float32}, "triton_chunks"),
        ({"device": "cpu"}, "chunked"),
        ({"dtype": torch.float64}, "chunked"),
        ({"widest": 129}, "chunked"),
        ({"whole": False}, "reference"),
        ({"spec": WindowLinear(window=65, shape="terraced", scaling=1.0)}, "chunked"),
        ({"spec": WindowLinear(window=128, shape="sliding", scaling=1.0)}, "triton_chunks"),
    ],
)
def test_calls_that_the_kernels_do_not_take_go_to_another_backend(changed: dict, backend: str) -> None:
    spec = WindowLinear(window=64, shape="terraced", scaling=1.0)
    options = {"device": "cuda", "dtype": torch.bfloat16, "tokens": 1000, "spec": spec, "widest": 128} | changed
    chosen, why = choice(WindowCall(**options))
    assert chosen == backend and (backend == "triton_chunks" or "not triton_chunks: " in why or backend == "reference")
