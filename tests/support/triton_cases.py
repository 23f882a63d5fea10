"""Cases of `test_triton_multi_step.py`: run by it with TRITON_INTERPRET=1 in a process of their own, where kernels run
on CPU tensors. Prints one JSON object: for each case the numbers that the test judges, or its traceback.

Every case compares with the PyTorch road in fp64 over the live tokens alone, one row at a time.
"""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from kernel_device import DEVICE, HALF, seeded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import linearize.ops.recurrent.decay_linear as decay_op
import linearize.ops.recurrent.gated_delta as delta_op
import linearize.ops.recurrent.selective_scan as scan_op
from linearize.mixers import MIXERS, AttentionShape
from linearize.mixers.layer_mixer import LayerMixer, RecurrentState
from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear import gated_linear
from linearize.ops.recurrent.reference import decay_linear as decay_reference
from linearize.ops.recurrent.reference import gated_delta as delta_reference
from linearize.ops.recurrent.reference import selective_scan as scan_reference
from linearize.ops.triton.channels import selective_scan_steps
from linearize.ops.triton.fused_heads import HeadSizes, gated_delta_net_steps, mamba2_steps
from linearize.ops.triton.mamba import ChannelSizes, mamba_steps
from linearize.ops.triton.recurrence import decay_linear_steps, gated_delta_steps

NAN = float("nan")
GROUPED = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=6, value_dim=10, model_dim=11)
SHAPE = AttentionShape(num_heads=2, num_kv_heads=1, head_dim=6, value_dim=10, model_dim=11)
SQUARE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=6, value_dim=6, model_dim=11)
WIDE = AttentionShape(num_heads=1, num_kv_heads=1, head_dim=130, value_dim=67, model_dim=11)
# Positions of two rows: row 0 keeps 2 of 3 tail tokens and row 1 keeps 1; then 3 new tokens, the last of row 0 dead.
TAIL, DEAD = 3, torch.tensor([[7, 8, -1, 9, 10, -1], [4, -1, -1, 5, 6, 7]])

real_empty, real_empty_like = torch.empty, torch.empty_like


def poison() -> None:
    """New memory is full of NaN: what a kernel forgets to write is seen."""
    torch.empty = lambda *a, **k: _full(real_empty(*a, **k))  # type: ignore[assignment]
    torch.empty_like = lambda *a, **k: _full(real_empty_like(*a, **k))  # type: ignore[assignment]


def _full(x: Tensor) -> Tensor:
    return x.fill_(NAN) if x.is_floating_point() else x


def padded(x: Tensor) -> Tensor:
    """The same values amid NaN: rows longer than they say, more tokens than are used."""
    around = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5), NAN, dtype=x.dtype)
    around[..., : x.shape[-2], : x.shape[-1]] = x
    return around[..., : x.shape[-2], : x.shape[-1]]


def rounded(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in tensors]


def gap(x: Tensor, y: Tensor) -> float:
    """Largest difference; inf where a NaN is."""
    if not x.numel():
        return 0.0
    difference = (x.double() - y.double()).abs().max().item()
    return difference if difference == difference else float("inf")


# The recurrences as given ---------------------------------------------------------------------------------------------


def by_row(
    backend: Callable[..., Any], inputs: tuple[Tensor, ...], state: Tensor, commit: int, dead: bool, dim: int
) -> Any:
    """y of the tokens after `commit` (zeros for dead ones) and the state after `commit`; inputs[0] is only read."""
    ys, states = [], []
    for b in range(state.shape[0]):
        live = (DEAD[b] >= 0) if dead else torch.ones(inputs[1].shape[dim], dtype=torch.bool)
        before = live[:commit].nonzero()[:, 0]
        late = commit + live[commit:].nonzero()[:, 0]
        row = [x[b : b + 1] if x.dim() > 2 else x for x in inputs]

        def cut(index: Tensor, row: list[Tensor] = row) -> list[Tensor]:
            return [x.index_select(dim, index) if x.dim() > 2 else x for x in row]

        after = backend(*cut(before), layout=Layout(), state=state[b : b + 1])[1] if len(before) else state[b : b + 1]
        y = backend(*cut(late), layout=Layout(), state=after)[0]
        full = torch.zeros(*y.shape[:dim], inputs[1].shape[dim] - commit, *y.shape[dim + 1 :], dtype=y.dtype)
        full.index_copy_(dim, late - commit, y)
        ys.append(full)
        states.append(after)
    return torch.cat(ys), torch.cat(states)


def alive(y: Tensor, commit: int, dead: bool, dim: int) -> Tensor:
    """y with zeros for dead tokens."""
    if not dead:
        return y
    mask = (DEAD[:, commit:] >= 0).view(*[2 if d == 0 else y.shape[d] if d == dim else 1 for d in range(y.dim())])
    return torch.where(mask, y, 0)


def op_case(
    kernel: Callable[..., Any],
    backend: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    query: int,
    state: Tensor,
    dim: int,
) -> Callable[..., dict[str, float]]:
    """`query`: which input has the outputs' tokens alone; `dim`: which dimension counts tokens."""

    def run(*, dtype: torch.dtype, commit: int, dead: bool, in_place: bool = False) -> dict[str, float]:
        call_inputs = [x.to(dtype, copy=True) for x in inputs]
        y0, s0 = by_row(backend, tuple(x.double() for x in call_inputs), state.double(), commit, dead, dim)
        y1, _ = by_row(backend, tuple(x.float() for x in call_inputs), state, commit, dead, dim)
        layout = Layout(position_BT=DEAD) if dead else Layout(start=7)
        call_inputs[query] = call_inputs[query].narrow(dim, commit, call_inputs[query].shape[dim] - commit)
        call_inputs = [padded(x) if x.dim() == 4 else x for x in call_inputs]
        own_state = state.clone()
        if dead:
            for x in call_inputs:
                if x.dim() > 2 and x.shape[dim] == DEAD.shape[1]:
                    x.masked_fill_((DEAD < 0).view(*[n if d in (0, dim) else 1 for d, n in enumerate(x.shape)]), NAN)
        y, s = kernel(
            *call_inputs, layout=layout, state=own_state, commit=commit, state_out=own_state if in_place else None
        )
        return {
            "y": gap(alive(y, commit, dead, dim), y0),
            "torch": gap(y1.to(dtype), y0),
            "state": gap(s, s0),
            "in_place": float(s is own_state),
        }

    return run


def op_cases() -> dict[str, Callable[..., dict[str, float]]]:
    g = seeded(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    T, K, V = DEAD.shape[1], 5, 9
    q, k, v = normal(2, 3, T, K), normal(2, 3, T, K), normal(2, 3, T, V)
    head, per_key = -normal(2, 3, T).abs(), -normal(2, 3, T, K).abs()
    unit, beta = k / k.norm(dim=-1, keepdim=True), torch.rand(2, 3, T, generator=g)
    S, h = normal(2, 3, K, V), normal(2, 14, 3)
    scan = (normal(2, T, 14), normal(2, T, 14).abs(), -normal(14, 3).abs(), normal(2, T, 7, 3), normal(2, T, 7, 3))
    return {
        "decay per head": op_case(decay_linear_steps, decay_reference, (q, k, v, head), 0, S, 2),
        "decay per key": op_case(decay_linear_steps, decay_reference, (q, k, v, per_key), 0, S, 2),
        "gated delta": op_case(gated_delta_steps, delta_reference, (q, unit, v, head, beta), 0, S, 2),
        "selective scan": op_case(selective_scan_steps, scan_reference, scan, 4, h, 1),
    }


def dispatched() -> dict[str, float]:
    """The backends as the operations choose them by name: the kernel against the step-by-step backend, with a tail."""
    g = seeded(5)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    q, k, v, decay = normal(2, 3, 3, 5), normal(2, 3, 7, 5), normal(2, 3, 7, 9), -normal(2, 3, 7).abs()
    scan = (normal(2, 7, 14), normal(2, 7, 14).abs(), -normal(14, 3).abs(), normal(2, 7, 7, 3), normal(2, 3, 7, 3))
    calls = {
        "decay": (decay_op, (q, k, v, decay), normal(2, 3, 5, 9)),
        "delta": (delta_op, (q, k / k.norm(dim=-1, keepdim=True), v, decay, decay.exp()), normal(2, 3, 5, 9)),
        "scan": (scan_op, scan, normal(2, 14, 3)),
    }
    gaps = {}
    for name, (op, inputs, state) in calls.items():
        results = {}
        for backend in ("triton", "reference"):
            with op.use_backend(backend):
                run = getattr(op, op.__name__.rpartition(".")[2])
                results[backend] = run(*inputs, layout=Layout(start=7), state=state.clone(), commit=4)
        gaps[name] = max(gap(a, b) for a, b in zip(results["triton"], results["reference"], strict=True))
    return gaps


def gla_case() -> dict[str, float]:
    """Softmax of q and k, log sigmoid of the keys, two query heads to a state; retention's norm by itself."""
    g = seeded(5)
    q, k, keys = (torch.randn(2, n, 7, 5, generator=g) for n in (6, 3, 3))
    v, S = torch.randn(2, 3, 7, 9, generator=g), torch.randn(2, 3, 5, 9, generator=g)
    decay = torch.nn.functional.logsigmoid(keys.double()) / 16.0
    many = [x.repeat_interleave(2, 1) for x in (k.double().softmax(-1), v.double(), decay, S.double())]
    y0, _ = decay_reference(q.double().softmax(-1), *many[:3], layout=Layout(), state=many[3])
    _, s0 = decay_reference(*[x[:, :, :4] for x in (q.double(), *many[:3])], layout=Layout(), state=many[3])
    y, s = decay_linear_steps(q[:, :, 4:], k, v, keys, layout=Layout(), state=S, commit=4, gate_divisor=16.0)
    plain = -torch.rand(2, 3, 7, generator=g)
    z, _ = decay_linear_steps(q[:, :3], k, v, plain, layout=Layout(), state=S, norm_eps=1e-5)
    z0, _ = decay_reference(*(x.double() for x in (q[:, :3], k, v, plain)), layout=Layout(), state=S.double())
    z0 = torch.nn.functional.layer_norm(z0, (9,), eps=1e-5)
    return {"y": gap(y, y0[:, :, 4:]), "state": gap(s, s0[:, ::2]), "norm": gap(z, z0)}


@torch.no_grad()
def gla_dispatched() -> dict[str, float]:
    """The operation that the mixer calls: the kernel gives what separate maps, gates and a recurrence give, alone."""
    g = torch.Generator().manual_seed(6)
    q, k, keys = (torch.randn(2, n, t, 5, generator=g) for n, t in ((6, 3), (3, 7), (3, 7)))
    v, S = torch.randn(2, 3, 7, 9, generator=g), torch.randn(2, 3, 5, 9, generator=g)
    results, operations = {}, {}
    for backend in ("triton", "multi_token"):
        for need in (True, False):
            with decay_op.use_backend(backend), Operations() as seen:
                options = {"layout": Layout(3), "state": S, "commit": 4, "need_state": need}
                results[backend, need] = gated_linear(q, k, v, keys, gate_divisor=16.0, **options)
            operations[backend] = seen.computing
    (y, s), (y0, s0) = results["triton", True], results["multi_token", True]
    none = float(results["triton", False][1] is not None)
    alone = gap(results["triton", False][0], y0)
    counts = {"beside the kernel": float(operations["triton"]), "one by one": float(operations["multi_token"])}
    return {"y": gap(y, y0), "state": gap(s, s0), "without": alone, "none": none, **counts}


class Operations(TorchDispatchMode):
    """Counts the operations of torch that would be launched: all but views, new memory and what the interpreter and
    the poisoned memory do around a kernel."""

    computing = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = ("empty", "view", "slice", "select", "transpose", "detach", "alias", "as_strided", "permute", "expand")
        views += ("new_empty", "set_", "copy_", "fill_", "promote_types")
        name = function.overloadpacket.__name__
        self.computing += not any(name.startswith(view) for view in views)
        return function(*args, **(kwargs or {}))


# Between the projections of a mixer -----------------------------------------------------------------------------------


def build(name: str, shape: AttentionShape, dtype: torch.dtype, **config: Any) -> LayerMixer:
    torch.manual_seed(7)
    mixer = MIXERS[name](**config).build(shape)
    assert isinstance(mixer, LayerMixer)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_((parameter + 0.3 * torch.randn_like(parameter)).to(dtype))
    return mixer


def project(mixer: Any, hidden: Tensor) -> list[Tensor]:
    """What the kernel of this mixer takes, amid NaN."""
    if mixer.config.name == "mamba":
        return [padded(x) for x in (mixer.in_proj(hidden), mixer.dt_proj(mixer.dt_in(hidden)))]
    if mixer.config.name == "mamba2":
        return [padded(mixer.in_proj(hidden))]
    return [padded(m(hidden)) for m in (mixer.qkv_proj, mixer.decay_proj, mixer.beta_proj, mixer.gate_proj)]


def kernel_call(mixer: Any, raw: list[Tensor], memory: Tensor | None, taps: Tensor | None, **options: Any) -> Any:
    """y before the output projection, memory, taps: by the kernel of this mixer."""
    shape, name = mixer.shape, mixer.config.name
    state = {"memory": memory, "taps_BPC": taps, **options}
    if name == "mamba":
        sizes = ChannelSizes(
            heads=shape.num_heads,
            groups=shape.num_kv_heads,
            head_dim=shape.head_dim,
            state_dim=mixer.state_dim,
            repeat=mixer.config.repeat,
        )
        weights = {"conv_bias_C": mixer.conv_bias, "dt_bias_E": mixer.dt_bias, "A_log_EN": mixer.A_log, "D_E": mixer.D}
        return mamba_steps(*raw, conv_weight_CW=mixer.conv_weight, **weights, sizes=sizes, **state)
    heads = HeadSizes(
        heads=shape.num_heads,
        groups=shape.num_kv_heads,
        key_dim=shape.head_dim,
        value_dim=shape.value_dim,
        repeat=mixer.config.repeat,
    )
    weights = {"conv_weight_CW": mixer.conv_weight, "dt_bias_H": mixer.dt_bias, "A_log_H": mixer.A_log}
    state |= {"sizes": heads, "eps": shape.norm_eps}
    if name == "mamba2":
        weights |= {"conv_bias_C": mixer.conv_bias, "D_H": mixer.D, "norm_weight": mixer.norm_weight}
        return mamba2_steps(*raw, **weights, **state)
    return gated_delta_net_steps(*raw, **weights, norm_weight_V=mixer.norm_weight, **state)


def truth(mixer: Any, hidden: Tensor, state: Any, commit: int, dead: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs after the tail (zeros for dead tokens), memory and taps after it, row by row without dead tokens."""
    rows = []
    for b in range(hidden.shape[0]):
        live = (DEAD[b] >= 0) if dead else torch.ones(hidden.shape[1], dtype=torch.bool)
        here = None if state is None else state.map_batch(lambda x, b=b: x[b : b + 1])
        tail, new = hidden[b : b + 1, :commit][:, live[:commit]], hidden[b : b + 1, commit:][:, live[commit:]]
        past = 0 if here is None else 3
        if tail.shape[1]:
            _, here = mixer(tail, layout=Layout(start=past), state=here)
        y, after = mixer(new, layout=Layout(start=past + tail.shape[1]), state=here)
        full = torch.zeros(1, hidden.shape[1] - commit, y.shape[2], dtype=y.dtype)
        full[:, live[commit:]] = y
        here = after.map_batch(torch.zeros_like) if here is None else here
        rows.append((full, here.memory, here.taps))
    y, memory, taps = (torch.cat(x) for x in zip(*rows, strict=True))
    return y, memory, taps


@torch.no_grad()
def mixer_case(
    name: str,
    shape: AttentionShape,
    *,
    dtype: torch.dtype,
    commit: int,
    dead: bool,
    fresh: bool = False,
    rows: int = 2,
    **config: Any,
) -> dict[str, float]:
    """One call of the kernel against the mixer in fp64; and the mixer in `dtype` against it too."""
    mixer, exact = build(name, shape, dtype, **config), build(name, shape, dtype, **config).double()
    if dtype is not torch.float32:
        for key, parameter in mixer.named_parameters():
            if key not in (mixer.fp32_parameters or ()):
                parameter.data = parameter.data.to(dtype)
    hidden = torch.randn(rows, DEAD.shape[1], shape.model_dim, generator=seeded(1)).to(dtype)
    early = torch.randn(rows, 3, shape.model_dim, generator=seeded(2)).to(dtype)
    state = None if fresh else mixer(early, layout=Layout())[1]
    wide = None if state is None else RecurrentState(state.memory.double(), state.taps.double())
    y0, memory0, taps0 = truth(exact, hidden.double(), wide, commit, dead)
    y1, memory1, _ = truth(mixer, hidden, state, commit, dead)
    kernel_hidden = hidden.clone()
    if dead:
        kernel_hidden[DEAD < 0] = NAN
    layout = Layout(position_BT=DEAD) if dead else Layout(start=0 if fresh else 3)
    memory, taps = (None, None) if state is None else (state.memory.clone(), state.taps)
    options: dict[str, Any] = {"outputs": hidden.shape[1] - commit, "commit": commit, "memory_out": memory}
    y, after, taps = kernel_call(mixer, project(mixer, kernel_hidden), memory, taps, layout=layout, **options)
    return {
        "y": gap(alive(mixer.out_proj(y), commit, dead, 1), y0),
        "torch": gap(y1, y0),
        "state": gap(after, memory0),
        "torch_state": gap(memory1, memory0),
        "taps": gap(taps, taps0),
        "in_place": float(after is memory),
    }


@torch.no_grad()
def same_bits(name: str) -> dict[str, float]:
    """Cutting a text in other places changes no bit of outputs, state or taps."""
    mixer = build(name, SQUARE if name == "mamba" else SHAPE, torch.float32, conv_taps=3)
    raw = project(mixer, torch.randn(1, 5, 11, generator=seeded(4)))
    whole, memory, taps = kernel_call(mixer, raw, None, None, layout=Layout())
    first = [x[:, :4] for x in raw]
    y, m, c = kernel_call(mixer, first, None, None, layout=Layout(), commit=2, outputs=1)
    differ = int((y != whole[:, 3:4]).sum())
    ys = []
    for t in range(2, 5):  # one token after the other, from the state that the multi-step call left
        one = [x[:, t : t + 1] for x in raw]
        y, m, c = kernel_call(mixer, one, m, c, layout=Layout(start=t), memory_out=m)
        ys.append(y)
    differ += int((torch.cat(ys, 1) != whole[:, 2:]).sum() + (m != memory).sum() + (c != taps).sum())
    return {"differ": float(differ), "spread": whole.std().item()}


@torch.no_grad()
def documents(name: str) -> dict[str, float]:
    """A token at position 0 finds nothing of what was before: its row equals a row that begins there."""
    mixer = build(name, SQUARE if name == "mamba" else SHAPE, torch.float32, conv_taps=3)
    raw = project(mixer, torch.randn(1, 4, 11, generator=seeded(4)))
    packed = Layout(position_BT=torch.tensor([[5, 0, 1, 2]]))
    _, memory, taps = kernel_call(mixer, [x[:, 2:] for x in raw], None, None, layout=Layout())
    y, after, taps_after = kernel_call(mixer, raw, memory, taps, layout=packed)
    y0, after0, taps0 = kernel_call(mixer, [x[:, 1:] for x in raw], None, None, layout=Layout())
    y_on, *_ = kernel_call(mixer, raw, memory, taps, layout=Layout(start=5))
    return {
        "y": gap(y[:, 1:], y0),
        "state": gap(after, after0),
        "taps": gap(taps_after, taps0),
        "without": gap(y_on[:, 1:], y0),
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32, tail": {"dtype": torch.float32, "commit": TAIL, "dead": False},
    "fp32, no tail": {"dtype": torch.float32, "commit": 0, "dead": False},
    "fp32, dead": {"dtype": torch.float32, "commit": TAIL, "dead": True},
    "fp16, dead": {"dtype": HALF, "commit": TAIL, "dead": True},
}


def cases() -> dict[str, Callable[[], dict[str, float]]]:
    runs: dict[str, Callable[[], dict[str, float]]] = {"gla and norm": gla_case, "dispatched": dispatched}
    runs["gla dispatched"] = gla_dispatched
    for op, run in op_cases().items():
        for label, setting in SETTINGS.items():
            runs[f"{op}; {label}"] = lambda run=run, s=setting: run(**s, in_place=s["commit"] > 0)
    for name in ("mamba", "mamba2", "gated_delta_net"):
        multi_token = {"state_dim": 3} if name == "mamba" else {}
        shape, grouped = (SQUARE, SQUARE) if name == "mamba" else (SHAPE, GROUPED)
        more = {
            "fp32, dead": (shape, {**SETTINGS["fp32, dead"], **multi_token, "repeat": "before", "conv_taps": 3}),
            "fp16, dead": (shape, {**SETTINGS["fp16, dead"], **multi_token, "repeat": "after", "conv_taps": 3}),
            "fp32, no tail": (grouped, {**SETTINGS["fp32, no tail"], "repeat": "after", "rows": 1, "conv_taps": 2}),
            "fresh": (shape, {**SETTINGS["fp32, tail"], "repeat": "before", "rows": 1, "fresh": True}),
        }
        for label, (size, setting) in more.items():
            runs[f"{name}; {label}"] = lambda n=name, s=size, o=setting: mixer_case(n, s, **o)
        runs[f"{name}; same bits"] = lambda n=name: same_bits(n)
        runs[f"{name}; documents"] = lambda n=name: documents(n)
    cut = {**SETTINGS["fp32, tail"], "rows": 1, "conv_taps": 2}
    runs["mamba2; cut"] = lambda: mixer_case("mamba2", WIDE, **cut)
    return runs


def quicken() -> None:
    """The interpreter replaces the members of `triton.language` anew at every call of a function inside a kernel, where
    they are replaced already: most of its time. Nothing on a GPU."""
    if DEVICE != "cpu":
        return
    import triton.runtime.interpreter as interpreter

    listing = SimpleNamespace(**vars(inspect))
    listing.getmembers = cache(inspect.getmembers)
    interpreter.inspect = listing
    replaced: set[int] = set()

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if id(self.fn.__globals__) not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **options)

    interpreter.InterpretedFunction.__call__ = call


def main() -> None:
    quicken()
    poison()
    results: dict[str, Any] = {}
    for name, run in cases().items():
        try:
            results[name] = run()
        except Exception:
            results[name] = {"error": traceback.format_exc()[-2000:]}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
