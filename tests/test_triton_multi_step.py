"""The multi-step kernels: values in Triton's interpreter (fp32, fp16), building without a GPU (bf16).

The interpreter is chosen when triton is imported, so the cases run in a process of their own: `triton_cases.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from linearize.ops import triton as kernels
from linearize.ops.dispatch import Call

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (the extra `gpu`, Linux)")
MIXERS = ["mamba", "mamba2", "gated_delta_net"]
OPS = ["decay per head", "decay per key", "gated delta", "selective scan"]
KINDS = ["fp32, tail", "fp32, no tail", "fp32, dead", "fp16, dead"]
ROUNDING = {"fp32": 2e-6, "fp16": 1e-3, "bf16": 8e-3}  # what a sum's order or one rounding of an output may change


def run(*command: str, interpret: bool, device: str = "cpu") -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LINEARIZE_KERNELS": device}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_cases(script: str, device: str, *arguments: str) -> dict[str, Any]:
    """What the cases of a script found: in the interpreter, or on a GPU."""
    path = str(Path(__file__).parent / "support" / script)
    result: dict[str, Any] = json.loads(run(path, *arguments, interpret=device == "cpu", device=device))
    return result | {"half dtype": "fp16" if device == "cpu" else "bf16"}


@pytest.fixture(scope="module")
def results(kernel_device: str) -> dict[str, Any]:
    return run_cases("triton_cases.py", kernel_device)


def case(results: dict[str, dict[str, float]], name: str) -> dict[str, float]:
    result = results[name]
    assert "error" not in result, result["error"]
    return result


def judge(result: dict[str, float], dtype: str) -> None:
    """At most twice the error of the PyTorch road in the same dtype (or a rounding)."""
    assert result["y"] <= max(2 * result["torch"], ROUNDING[dtype]), result
    assert result["state"] <= max(2 * result.get("torch_state", 0), 2e-6), result


@needs_triton
def test_operations_take_the_kernel_by_name(results: dict) -> None:
    numbers = case(results, "dispatched")
    assert set(numbers) == {"decay", "delta", "scan"} and max(numbers.values()) < 5e-6


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_an_operation_advances_over_the_tail_and_gives_the_new_outputs(op: str, kind: str, results: dict) -> None:
    numbers = case(results, f"{op}; {kind}")
    judge(numbers, results["half dtype"] if kind[:4] == "fp16" else "fp32")
    assert numbers["in_place"] == float(kind != "fp32, no tail")


@needs_triton
@pytest.mark.parametrize("kind", ["fp32, dead", "fp16, dead", "fp32, no tail", "fresh"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_fused_kernel_gives_what_its_mixer_gives(mixer: str, kind: str, results: dict) -> None:
    numbers, dtype = case(results, f"{mixer}; {kind}"), results["half dtype"] if "fp16" in kind else "fp32"
    judge(numbers, dtype)
    assert numbers["taps"] <= ROUNDING[dtype]


@needs_triton
def test_heads_too_large_for_one_program_are_cut(results: dict) -> None:
    judge(case(results, "mamba2; cut"), "fp32")


@needs_triton
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_bit_depends_on_where_a_text_is_cut(mixer: str, results: dict) -> None:
    numbers = case(results, f"{mixer}; same bits")
    assert numbers["differ"] == 0 and numbers["spread"] > 0.01


@needs_triton
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_new_document_finds_nothing_of_the_last(mixer: str, results: dict) -> None:
    numbers = case(results, f"{mixer}; documents")
    assert max(numbers["y"], numbers["state"], numbers["taps"]) < 1e-7
    assert numbers["without"] > 0.01  # what the last document would have brought in


@needs_triton
def test_gated_linear_attention_and_retention_are_fused_with_what_stands_around_them(results: dict) -> None:
    assert max(case(results, "gla and norm").values()) < 2e-6


@needs_triton
def test_the_gates_of_gated_linear_attention_are_no_launches_of_their_own(results: dict) -> None:
    numbers = case(results, "gla dispatched")
    assert max(numbers[name] for name in ("y", "state", "without", "none")) < 2e-6
    assert numbers["beside the kernel"] == 0 and numbers["one by one"] > 10


@pytest.mark.slow
@needs_triton
def test_every_kernel_builds_for_gpus_that_are_not_here() -> None:
    quick = ["--arch", "90", "--dtype", "bfloat16", "--head-dim", "16"]
    one_each = ["--only", "gated delta", "selective scan", "mamba", "mamba2"]
    rows = json.loads(run("-m", "benchmarks.compile_kernels", *quick, *one_each, interpret=False))["rows"]
    built = {row["kernel"] for row in rows if row["cubin_bytes"] > 0}
    assert built == {"recurrence_kernel", "scan_kernel", "mamba_kernel", "heads_kernel"}
    older = ["--arch", "80", "--only", "selective scan"]
    result = json.loads(run("-m", "benchmarks.compile_kernels", *older, interpret=False))
    assert result["rows"][0]["arch"] == 80


def test_kernels_are_for_gpus_alone_and_imported_when_asked_for() -> None:
    import torch

    call = Call(device="cpu", dtype=torch.zeros(3).dtype, tokens=3)
    assert kernels.why_not_chosen(call) == "the tensors are on cpu"
    code = "import sys, linearize.ops.triton; print([m for m in sys.modules if m.startswith('linearize.ops.triton.')])"
    assert run("-c", code, interpret=False).strip() == "[]"
