"""Recurrent operations on a GPU: this package's backends against fla's and mamba-ssm's, shape by shape.

`take` in each row is what a rule of the operation's `backends.py` should choose: the installed package's backend,
unless it is over 20% slower or does not run. Forward, and where gradients exist forward with backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.on_gpu import Clock, arguments, device_for, facts, fastest, ratio, timings_json
from benchmarks.timing import SEED, parser, publish_each
from linearize.errors import unknown
from linearize.ops.dispatch import MAX_MULTI_TOKEN
from linearize.ops.layout import Layout
from linearize.ops.recurrent import decay_linear as decay
from linearize.ops.recurrent import gated_delta as delta
from linearize.ops.recurrent import selective_scan as scan

MARGIN = 1.2  # theirs may take so many times as long as ours before ours is taken
THEIRS = ("fla", "mamba_ssm")
FORWARD_ONLY = ("triton", "reference", "multi_token")  # the multi-step kernel, and forms of a few tokens
SMALL = {"tokens": [2, 9], "heads": 2, "head_dim": 4, "state_dim": 3, "batch": 1, "repeats": 1}
Inputs = Callable[[Any, int, torch.device, torch.dtype], list[Tensor]]


def _some(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(SEED)
    return lambda *size: torch.randn(*size, device=device, generator=generator).to(dtype)


def _decay(per_key: bool, chosen: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    some, size = _some(device, dtype), (chosen.batch, chosen.heads, tokens)
    q, k, v = (some(*size, chosen.head_dim) for _ in range(3))
    return [q, k, v, -some(*size, *((chosen.head_dim,) if per_key else ())).float().abs()]


def _delta(chosen: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, log_decay = _decay(False, chosen, tokens, device, dtype)
    unit = (k.float() / k.float().norm(dim=-1, keepdim=True)).to(dtype)
    return [q, unit, v, log_decay, torch.sigmoid(log_decay)]


def _scan(chosen: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    some, channels = _some(device, dtype), chosen.heads * chosen.head_dim
    x, dt = some(chosen.batch, tokens, channels), some(chosen.batch, tokens, channels).float().abs()
    B, C = (some(chosen.batch, tokens, chosen.heads, chosen.state_dim) for _ in range(2))
    return [x, dt, -some(channels, chosen.state_dim).float().abs(), B, C]


OPERATIONS: dict[str, tuple[Any, Any, Inputs]] = {
    "decay per head": (decay, decay.decay_linear, partial(_decay, False)),
    "decay per key": (decay, decay.decay_linear, partial(_decay, True)),
    "gated delta": (delta, delta.gated_delta, _delta),
    "selective scan": (scan, scan.selective_scan, _scan),
}


def forms_for(module: Any, tokens: int, gradients: bool) -> list[str]:
    """Those worth a try: the step-by-step backend only for one token, multi-token backends only for a few; of packages
    those that are installed."""
    tried = []
    for name in module.BACKENDS:
        if name in THEIRS and find_spec(name) is None:
            continue
        short = {
            "reference": tokens == 1,
            "multi_token": tokens <= MAX_MULTI_TOKEN,
            "triton": tokens <= MAX_MULTI_TOKEN,
        }.get(name, tokens > 1)
        if short and not (gradients and name in FORWARD_ONLY):
            tried.append(name)
    return tried


def run_of(module: Any, operation: Any, name: str, inputs: Sequence[Tensor], gradients: bool) -> Callable[[], Any]:
    """One backend over a text without a state."""

    def forward() -> Tensor:
        with module.use_backend(name):
            y: Tensor = operation(*inputs, layout=Layout(), need_state=not gradients)[0]
        return y

    if not gradients:
        return torch.no_grad()(forward)
    return lambda: torch.autograd.grad(forward().float().sum(), inputs, allow_unused=True)


def measure(clock: Clock, name: str, tokens: int, chosen: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for the forward pass, and one with the backward pass if the backend has one."""
    module, operation, make = OPERATIONS[name]
    rows = []
    for gradients in (False, True):
        inputs = [x.requires_grad_(gradients) for x in make(chosen, tokens, clock.device, dtype)]
        names = forms_for(module, tokens, gradients)
        runs = {backend: run_of(module, operation, backend, inputs, gradients) for backend in names}
        if not runs:
            continue
        times = clock.interleaved(runs, chosen.repeats, warmup=0 if chosen.interpret else 3)
        own = fastest(times, [backend for backend in names if backend not in THEIRS])
        other = fastest(times, [backend for backend in names if backend in THEIRS])
        slower = ratio(times, other, own)
        row = {"operation": name, "tokens": tokens, "backward": gradients, "milliseconds": timings_json(times)}
        rows.append(row | {"theirs_over_ours": slower, "take": own if slower is None or slower > MARGIN else other})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run and publish; without a GPU print one line."""
    options = parser(__doc__)
    options.set_defaults(repeats=20)
    options.add_argument("--operation", nargs="+", default=list(OPERATIONS))
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 512, 2048, 8192, 32768])
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--head-dim", type=int, default=128)
    options.add_argument("--state-dim", type=int, default=16, help="of the selective scan")
    options.add_argument("--batch", type=int, default=1)
    chosen = arguments(options, argv, SMALL)
    if wrong := sorted(set(chosen.operation) - set(OPERATIONS)):
        raise unknown("operation", wrong[0], OPERATIONS)
    device = device_for(chosen, "benchmarks.recurrent_gpu", argv)
    if device is None:
        return
    dtype = torch.float32 if chosen.interpret else torch.bfloat16
    clock = Clock(device)
    setting = {key: value for key, value in vars(chosen).items() if key != "out"}
    setting |= {"dtype": str(dtype), "margin": MARGIN, **facts(device)}
    asked = "own kernels only where fla's and mamba-ssm's lose by more than 20%"
    rows = (
        row
        for name in chosen.operation
        for tokens in chosen.tokens
        for row in measure(clock, name, tokens, chosen, dtype)
    )
    publish_each(asked, setting, rows, chosen.out)


if __name__ == "__main__":
    main()
