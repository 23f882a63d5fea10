"""The error of every backend of every operation against fp64, as a multiple of that of PyTorch's SDPA.

Both get the same tokens, heads and dtype, and each is compared with itself in fp64 on the numbers it was given, already
rounded. Errors are taken head by head: the largest difference over the head's largest number, averaged over rows and
heads (`max`: of one head it is a matter of luck), and the root mean square of the differences over that of the numbers,
of the worst head (`rms`). The target: no backend has more than twice the error of SDPA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.exactness_cases import FORWARD_ONLY, SCALING, Problem, kernel_problems, problems
from benchmarks.timing import parser, publish
from linearize.ops.triton import has_triton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ASKED = 2.0
Errors = dict[str, dict[str, float]]


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> Errors:
    """Of each tensor: the relative errors, infinite where a NaN is."""
    return {name: _errors(actual[name], x) for name, x in exact.items()}


def _errors(actual: Tensor, exact: Tensor) -> dict[str, float]:
    assert actual.shape == exact.shape, f"{list(actual.shape)} and {list(exact.shape)}"
    around = tuple(range(2 if exact.dim() == 4 else 1, exact.dim()))  # without heads: a row is a head
    off = (actual.double() - exact).nan_to_num(nan=float("inf"))
    tiny = torch.finfo(torch.float64).tiny
    most = off.abs().amax(around) / exact.abs().amax(around).clamp(min=tiny)
    mean = (off.square().mean(around) / exact.square().mean(around).clamp(min=tiny)).sqrt()
    return {"max": most.mean().item(), "rms": mean.max().item()}


def results(
    problem: Problem, backend: str, dtype: torch.dtype, *, exactly: bool = False, device: str = "cpu"
) -> dict[str, Tensor]:
    """y and the gradients of the differentiated inputs, by a backend in `dtype` or by the reference in fp64."""
    inputs = [x.to(dtype).to(device) for x in problem.inputs]
    if exactly:
        inputs = [x.double() for x in inputs]
    leaves = [] if backend in FORWARD_ONLY else [x.requires_grad_() for x in inputs[: problem.differentiated]]
    y = problem.run("reference" if exactly else backend, inputs)
    late = problem.backends[backend]
    y = y[:, :, -late:] if late else y
    return _with_gradients(y, leaves, dtype)


def softmax_results(
    problem: Problem, backend: str, dtype: torch.dtype, *, exactly: bool = False, device: str = "cpu"
) -> Any:
    """The same of SDPA."""
    inputs = (x.to(dtype).to(device) for x in problem.attention)
    q, k, v = ((x.double() if exactly else x).requires_grad_(backend not in FORWARD_ONLY) for x in inputs)
    gqa, late = q.shape[1] != k.shape[1], problem.backends[backend]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALING, enable_gqa=gqa)
    return _with_gradients(y[:, :, -late:] if late else y, [] if backend in FORWARD_ONLY else [q, k, v], dtype)


def _with_gradients(y: Tensor, leaves: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    if not leaves:
        return {"y": y}
    torch.manual_seed(11)
    d_y = torch.randn(y.shape).to(dtype).to(y)
    grads = torch.autograd.grad(y, leaves, d_y)
    return {"y": y.detach(), **{f"d{i}": g for i, g in enumerate(grads)}}


def compare(problem: Problem, dtype: str, *, device: str = "cpu") -> list[dict[str, Any]]:
    """One row per backend: for y and each gradient the error over SDPA's; `worst` of them; `rms`: of y alone."""
    kind, rows = DTYPES[dtype], []
    for backend in problem.backends:
        ours = errors(
            results(problem, backend, kind, device=device), results(problem, backend, kind, exactly=True, device=device)
        )
        theirs = errors(
            softmax_results(problem, backend, kind, device=device),
            softmax_results(problem, backend, kind, exactly=True, device=device),
        )
        ratios = {name: _ratio(result, theirs[name]) for name, result in ours.items()}
        rows.append(
            {
                "operation": problem.operation,
                "backend": backend,
                "dtype": dtype,
                "case": problem.case,
                "device": device,
                "worst": max(ratios.values()),
                "ratios": ratios,
                "rms": float(f"{ours['y']['rms']:.2e}"),
            }
        )
    return rows


def _ratio(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """The larger of both errors' ratios."""
    return round(max(error / theirs[kind] for kind, error in ours.items()), 3)


def kernel_rows(dtypes: Sequence[str], *, quick: bool = False) -> list[dict[str, Any]]:
    """The rows of the Triton kernels, from a process of their own: on a GPU where there is one, else in Triton's
    interpreter, whose products in bf16 are wrong and are left out."""
    gpu = torch.cuda.is_available()
    asked = [name for name in dtypes if gpu or name != "bf16"]
    if not asked or not has_triton():
        return []
    environment = {**os.environ} if gpu else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.exactness", "--only-kernels", "--dtype", *asked]
    command += ["--device", "cuda" if gpu else "cpu", "--threads", "1", *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser(__doc__)
    options.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options.add_argument("--device", default="cpu", help="where the forms run; the kernels go to a GPU by themselves")
    options.add_argument("--quick", action="store_true", help="without the long texts")
    options.add_argument("--only-kernels", action="store_true", help="here; on CPU with TRITON_INTERPRET=1")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    asked = (kernel_problems if chosen.only_kernels else problems)(quick=chosen.quick)
    setting = {"threads": chosen.threads, "dtypes": chosen.dtype, "device": chosen.device}
    target = f"no form less exact than {ASKED} times SDPA in the same dtype"
    rows = kernel_rows(chosen.dtype, quick=chosen.quick) if not chosen.only_kernels else []
    for problem in asked:
        rows += [row for dtype in chosen.dtype for row in compare(problem, dtype, device=chosen.device)]
        publish(target, setting, rows, chosen.out, whole=False)
    worst = max(rows, key=lambda row: float(row["worst"]))
    line = f"worst: {worst['worst']:.2f} of SDPA's error ({worst['operation']}, {worst['backend']}, {worst['dtype']})"
    publish(target, setting, rows, chosen.out, line=line)


if __name__ == "__main__":
    main()
