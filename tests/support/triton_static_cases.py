"""Cases of `test_static_in_place.py`, run by it in Triton's interpreter as `triton_cases.py` says. Prints a JSON
object."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models import mixer, student_of, text, tiny
from static_cases import memory, prompts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton_cases import poison, quicken

from linearize.modeling.static.step import StaticStep
from linearize.ops.triton import window
from linearize.ops.window_linear import use_backend

ROWS = 3
KEPT = [[0, 0, 0], [1, 0, 2], [2, 1, 0]]
FREE = {"empty", "empty_strided", "new_empty", "fill_", "view", "unsqueeze", "transpose", "select", "slice", "unbind"}


def student() -> Any:
    """A layer with all that the kernel knows, and one with a window alone."""
    full = mixer("lolcats", window=3, feature_map="gain", affine=True, num_sinks=2, shift="shared")
    alone = mixer("sliding_window", window=4)
    return student_of(tiny("llama", attention="sdpa", num_hidden_layers=2), [full, alone])


class Counted:
    """Stands in the place of the kernel and counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1

        def launch(*args: Any, **options: Any) -> None:
            with _disable_current_modes():  # the interpreter's own copies
                self.kernel[grid](*args, **options)

        return launch


class Noted(TorchDispatchMode):
    """Notes what torch itself runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.ran.add(func.overloadpacket._qualified_op_name.rpartition("::")[2])
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counted]:
    kernel = window.window_kernel
    window.window_kernel = result = Counted(kernel)
    try:
        yield result
    finally:
        window.window_kernel = kernel


def filled(model: Any, **options: Any) -> StaticStep:
    made = StaticStep(model, batch=ROWS, **options)
    made.prefill(*prompts())
    return made


def compare(plain: StaticStep, step: StaticStep, width: int, kept: list[Any]) -> dict[str, float]:
    """The same steps by PyTorch and by the kernel: logits, state, addresses, launches in each."""
    addresses, launches, gap = [x.data_ptr() for x in memory(step)], set(), 0.0
    for seed, keep in enumerate(kept):
        tokens = text(ROWS, width, seed=seed)
        expected: Tensor = plain.step(tokens, keep)
        with use_backend("triton"), counted() as kernel:
            gap = max(gap, float((step.step(tokens, keep) - expected).abs().max()))
        launches.add(kernel.launches)
    pairs = zip(memory(step), memory(plain), strict=True)
    return {
        "logits": gap,
        "memory": max(float((a.double() - b.double()).abs().max()) if a.numel() else 0.0 for a, b in pairs),
        "moved": float(addresses != [x.data_ptr() for x in memory(step)]),
        "fewest": min(launches),
        "most": max(launches),
    }


def decoding() -> dict[str, float]:
    """Single tokens, which go into the state at once."""
    model = student()
    return compare(filled(model, rollback=False), filled(model, rollback=False), 1, [None] * 4)


def chunks() -> dict[str, float]:
    """Several tokens at once, none to be taken back."""
    model = student()
    return compare(*(filled(model, rollback=False, width=3) for _ in range(2)), 3, [None] * 2)


def verifying() -> dict[str, float]:
    """Guesses, of which rows keep different numbers."""
    model = student()
    return compare(filled(model, width=2), filled(model, width=2), 2, KEPT)


def undecided() -> dict[str, float]:
    """Tokens read while earlier ones wait: nothing is written to a state."""
    model = student()
    return compare(filled(model, width=4), filled(model, width=4), 1, [[0] * ROWS, None, [2, 0, 1]])


def launched() -> dict[str, Any]:
    """All that runs on the device for the operation of one layer, apart from its launch."""
    model = student()
    step = filled(model, rollback=False)
    ran: set[str] = set()
    mixers = [layer.self_attn.mixer for layer in model.lm.model.layers]

    def watch(module: Any) -> None:
        forward = module.forward

        def noted(*args: Any, **options: Any) -> Any:
            with Noted() as mode:
                result = forward(*args, **options)
            ran.update(mode.ran)
            return result

        module.forward = noted

    with use_backend("triton"), counted() as kernel:
        step.step(text(ROWS, 1))  # what is computed once for all layers is computed by the first
        for module in mixers[1:]:
            watch(module)
        step.step(text(ROWS, 1))
    return {"launches": kernel.launches, "others": sorted(ran - FREE), "views": sorted(ran & FREE)}


def compiled(backend: str, width: int) -> dict[str, Any]:
    """`torch.compile(fullgraph=True)` with the kernel: graphs, operators in them, and the values."""
    from torch._dynamo.backends.common import aot_autograd

    model, graphs = student(), []

    def seen(graph: torch.fx.GraphModule, _: Any) -> Any:
        asked = [f"{node.target} {node.args}" for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([name for name in asked if "window_steps" in name])
        return graph.forward

    rollback = width > 1
    plain, step = (filled(model, width=width, rollback=rollback) for _ in range(2))
    torch._dynamo.reset()
    step.compile(backend=seen if backend == "eager" else aot_autograd(fw_compiler=seen))
    with torch._dynamo.config.patch(error_on_recompile=True):
        result: dict[str, Any] = compare(plain, step, width, KEPT if rollback else [None] * 2)
    return result | {"graphs": len(graphs), "operators": len(graphs[0])}


CASES: dict[str, Any] = {
    "decoding": decoding,
    "chunks": chunks,
    "verifying": verifying,
    "undecided": undecided,
    "launched": launched,
    "aot_eager, 1": lambda: compiled("aot_eager", 1),
    "eager, 2": lambda: compiled("eager", 2),
}


def main() -> None:
    quicken()
    poison()
    results: dict[str, Any] = {}
    for name in sys.argv[1:] or CASES:
        try:
            with torch.no_grad():
                results[name] = CASES[name]()
        except Exception:
            results[name] = {"error": traceback.format_exc()[-2500:]}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
