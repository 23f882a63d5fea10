"""The scripts that measure and build the kernels run without a GPU: small, in the interpreter, and compile-only."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from benchmarks import compile_kernels
from test_triton_multi_step import needs_triton, run

import linearize.ops.triton as triton_package

pytestmark = pytest.mark.slow

SCRIPTS = [
    ("window_gpu", ["--tokens", "18", "--head-dim", "4", "--window", "4"]),
    ("recurrent_gpu", ["--tokens", "3", "--operation", "decay per key", "gated delta"]),
    ("model_gpu", []),
]


@needs_triton
def test_the_window_kernel_builds_for_gpus_that_are_not_here() -> None:
    quick = ["--arch", "80", "90", "100", "--dtype", "bfloat16", "--head-dim", "16", "--only", "window + linear"]
    rows = json.loads(run("-m", "benchmarks.compile_kernels", *quick, interpret=False))["rows"]
    assert [row["arch"] for row in rows] == [80, 90, 100]
    assert all(row["kernel"] == "window_kernel" and row["cubin_bytes"] > 0 and row["fits"] for row in rows)
    assert all(row["registers"] > 0 and row["stack_bytes"] < 200 for row in rows)


@needs_triton
def test_every_kernel_is_among_those_that_are_compiled() -> None:
    """Kernels are found by their name in the sources; a new one needs a call in `compile_kernels.calls`."""
    sources = Path(triton_package.__path__[0]).rglob("*.py")
    written = {name for file in sources for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    assert written == set(compile_kernels.kernels()) and len(written) > 10
    with compile_kernels.recording() as launches:
        for call in compile_kernels.calls(torch.bfloat16, key_dim=16, value_dim=16).values():
            call()
    assert {kernel.__name__ for kernel, *_ in launches} == written


@needs_triton
@pytest.mark.parametrize(("script", "options"), SCRIPTS)
def test_scripts_for_a_gpu_run_small_without_one(script: str, options: list[str]) -> None:
    result = json.loads(run("-m", f"benchmarks.{script}", "--interpret", *options, interpret=True))
    assert result["rows"] and result["setting"]["device"] == "cpu" and result["setting"]["interpret"]
    reasons = [x for row in result["rows"] for x in row.get("milliseconds", {}).values() if isinstance(x, str)]
    assert not reasons, reasons


@pytest.mark.parametrize("script", [name for name, _ in SCRIPTS])
def test_without_a_gpu_they_say_so(script: str) -> None:
    if not torch.cuda.is_available():
        assert "nothing was measured" in run("-m", f"benchmarks.{script}", interpret=False)


@pytest.mark.slow
@needs_triton
def test_the_benchmark_of_the_kernels_runs_without_a_gpu() -> None:
    small = ["--interpret", "--mixers", "mamba2", "sliding_window", "--tokens", "1", "--heads", "1", "--tail", "1"]
    result = json.loads(run("-m", "benchmarks.multi_step_gpu", *small, interpret=False))
    assert result["setting"]["gpu"] is None and result["setting"]["interpret"]
    backends = {row["mixer"]: set(row["microseconds"]) for row in result["rows"]}
    assert backends["mamba2"] == {"kernel", "single", "unfused", "projections"}
    assert backends["sliding_window"] == {"kernel", "single", "unfused", "in_place"}


def test_without_a_gpu_it_says_so() -> None:
    if not torch.cuda.is_available():
        assert "nothing was measured" in run("-m", "benchmarks.multi_step_gpu", interpret=False)
