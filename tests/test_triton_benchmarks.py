"""What measures and builds the kernels runs here too: small, in the interpreter, and for GPUs that are not there."""

from __future__ import annotations

import json

from test_triton_multi_step import needs_triton, run


@needs_triton
def test_the_window_kernel_builds_for_gpus_that_are_not_here() -> None:
    quick = ["--arch", "80", "90", "100", "--dtype", "bfloat16", "--head-dim", "16", "--only", "window + linear"]
    rows = json.loads(run("-m", "linearize.benchmarks.compile_kernels", *quick, interpret=False))
    assert [row["arch"] for row in rows] == [80, 90, 100]
    assert all(row["kernel"] == "window_kernel" and row["cubin_bytes"] > 0 for row in rows)


@needs_triton
def test_the_benchmark_of_the_kernels_runs_without_a_gpu() -> None:
    small = ["--interpret", "--mixers", "mamba2", "sliding_window", "--tokens", "1", "--heads", "1", "--tail", "1"]
    found = json.loads(run("-m", "linearize.benchmarks.multi_step_gpu", *small, interpret=False))
    assert found["setting"]["gpu"] is None and found["setting"]["interpret"]
    forms = {row["mixer"]: set(row["microseconds"]) for row in found["rows"]}
    assert forms["mamba2"] == {"kernel", "single", "unfused", "projections"}
    assert forms["sliding_window"] == {"kernel", "single", "unfused", "in_place"}


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if not torch.cuda.is_available():
        assert "nothing was measured" in run("-m", "linearize.benchmarks.multi_step_gpu", interpret=False)
