"""No backend of an operation is less exact than twice PyTorch's SDPA in the same dtype (`benchmarks.exactness`).

The bound holds for the outputs and for the gradients of q, k and v (of x, B and C for the scan, of x for the
convolution). Where features are tiny SDPA gets scores as large as their exponents: an exponent of 40 has an error of 40
roundings in both. The multi-step kernels and `in_place` give no gradients. The layers' fused kernels are held to twice
the error of the operations they stand for in `test_triton_multi_step.py`, since both round between the operations.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from benchmarks.exactness import ASKED, DTYPES, compare, errors
from benchmarks.exactness_cases import problems, window_problem
from test_triton_multi_step import needs_triton, run_cases
from torch import Tensor

from linearize.ops.recurrent.decay_linear import DISPATCH as DECAY
from linearize.ops.recurrent.gated_delta import DISPATCH as DELTA
from linearize.ops.recurrent.selective_scan import DISPATCH as SCAN
from linearize.ops.window_linear.backends import DISPATCH as WINDOW

PROBLEMS = list(problems(quick=True))


def check(rows: list[dict[str, Any]]) -> None:
    wrong = {
        (row["operation"], row["backend"], row["dtype"], row["case"]): row["ratios"] for row in rows if not ok(row)
    }
    assert rows and not wrong, wrong


def ok(row: dict[str, Any]) -> bool:
    return bool(row["worst"] <= ASKED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.operation}, {p.case}")
def test_no_backend_in_pytorch_is_less_exact_than_twice_sdpa(problem, dtype):
    check(compare(problem, dtype))


@pytest.mark.slow
@needs_triton
def test_no_kernel_is_less_exact_than_twice_sdpa(kernel_device):
    """In the interpreter in fp16: fp32 is held to fp64 by the kernels' own tests, and its products in bf16 are wrong.
    On a GPU in every dtype."""
    asked = ["--dtype", "fp16", "--quick"] if kernel_device == "cpu" else ["--dtype", *DTYPES]
    rows = run_cases("triton_exactness_cases.py", kernel_device, *asked)["rows"]
    check(rows)
    assert {row["backend"] for row in rows} == {"triton", "triton_chunks"}
    assert {row["device"] for row in rows} == {kernel_device}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (make gpu-test)")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.operation}, {p.case}")
def test_no_backend_in_pytorch_is_less_exact_than_twice_sdpa_on_a_gpu(problem, dtype):
    check(compare(problem, dtype, device="cuda"))


def test_every_backend_of_the_tables_is_measured():
    """Those of other packages need a GPU and the package: `--device cuda` measures them where they are."""
    measured = {(p.operation.split(" per")[0], backend) for p in PROBLEMS for backend in p.backends}
    names = {"window_linear": WINDOW, "decay": DECAY, "gated delta": DELTA, "selective scan": SCAN}
    for name, dispatcher in names.items():
        backends = {rule.backend for rule in dispatcher.rules} - {
            "triton",
            "triton_chunks",
            "fla",
            "mamba_ssm",
            "store",
        }
        assert backends <= {backend for operation, backend in measured if operation == name}, name


@pytest.mark.parametrize(
    ("backend", "where"),
    [
        ("multi_token", "multi_token.divide"),
        ("step", "multi_token._window"),
        ("reference", "reference.divide"),
        ("multi_token", "multi_token._weights"),
    ],
)
def test_a_rounding_in_a_backend_is_seen(backend, where, monkeypatch):
    """A normaliser in bf16, or window weights in bf16."""
    module, name = where.split(".")
    broken = import_module(f"linearize.ops.window_linear.{module}")
    real = getattr(broken, name)

    def rounded(*args: Any) -> Any:
        if name == "divide":
            total: Tensor = args[0]
            z = total[..., -1:].bfloat16().to(total.dtype) if total.dtype == torch.float32 else total[..., -1:]
            return real(torch.cat([total[..., :-1], z], dim=-1))
        if name == "_window":
            numerator, normaliser, m = real(*args)
            wide = normaliser.dtype == torch.float32
            return numerator, normaliser.bfloat16().to(normaliser.dtype) if wide else normaliser, m
        p, m = real(*args)
        return (p.bfloat16().to(p.dtype) if p.dtype == torch.float32 else p), m

    problem = window_problem("random", 61, {backend: 0 if backend == "reference" else 24})
    for dtype in ("fp32", "fp16"):
        check(compare(problem, dtype))
    monkeypatch.setattr(broken, name, rounded)
    assert not any(ok(row) for row in compare(problem, "fp32"))
    assert not any(ok(row) for row in compare(problem, "fp16"))


def test_errors_are_of_the_worst_head_and_a_nan_is_infinite():
    exact = {"y": torch.ones(1, 2, 3, 5).double()}
    outputs = {"y": exact["y"].clone()}
    outputs["y"][0, 1, 2, 3] += 0.5
    got = errors(outputs, exact)["y"]
    assert got["max"] == pytest.approx(0.25) and got["rms"] == pytest.approx((0.25 / 15) ** 0.5)
    outputs["y"][0, 0, 0, 0] = float("nan")
    assert not errors(outputs, exact)["y"]["max"] < 1e9
