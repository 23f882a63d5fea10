"""Cases of `test_triton_window.py`, run by it in Triton's interpreter as `triton_cases.py` says. Prints a JSON object.

Every case compares with the reference in fp64 over the live tokens alone, one row and one document after the other.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from kernel_device import HALF, seeded
from torch import Tensor
from triton_cases import NAN, SHAPE, SQUARE, build, gap, padded, poison, quicken

import linearize.ops.recurrent.layer_steps as layer
from linearize.mixers import MIXERS, AttentionShape
from linearize.mixers.feature_maps import FeatureMap
from linearize.ops.layout import Layout
from linearize.ops.triton import launch
from linearize.ops.triton.window import window_linear_steps
from linearize.ops.window_linear import WindowLinear, WindowLinearState, use_backend, window_linear
from linearize.ops.window_linear.reference import reference
from linearize.ops.window_linear.spec import fold_boundary
from linearize.ops.window_linear.state import WindowBuffers

H, G, D, V, C = 2, 1, 6, 5, 3
HEADS = AttentionShape(num_heads=H, num_kv_heads=G, head_dim=D, value_dim=V, model_dim=7)
# Two rows after 10 tokens each. Dead: row 0 keeps 2 of 3 tail tokens, row 1 one; a draft token of row 0 is dead too.
PAST, TAIL = 10, 3
DEAD = torch.tensor([[10, 11, -1, 12, 13, -1], [10, -1, -1, 11, 12, 13]])
# A document opens in the tail of row 0 and among the new tokens of row 1.
DOCUMENTS = torch.tensor([[10, 0, 1, 2, 3, 4], [10, 11, 12, 13, 0, 1]])
# The same, where the new document does not begin at position 0.
LATER = torch.tensor([[10, 11, 5, 6, 7, 8, 9, 10, 11, 12, 3, 4], [10, 11, 12, 13, 1, 2, 3, 4, 5, 6, 7, 8]])
JUMPS = torch.tensor([[10, 11, 5, 6, 7, 8], [10, 11, 12, 13, 4, 5]])


def some(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=seeded(seed)).to(dtype)


def make_spec(window: int, shape: str, feature: str | None, **options: Any) -> WindowLinear:
    def maps(seed: int) -> FeatureMap:
        made = FeatureMap(feature, HEADS, C, "identity").requires_grad_(False)
        for n, parameter in enumerate(made.parameters()):
            parameter.add_(0.5 * some(*parameter.shape, seed=seed + n))
        return made

    if feature is not None:
        options |= {"feature_q": maps(1), "feature_k": maps(11), "log_window_factor_H": -some(H, seed=21).abs()}
    return WindowLinear(window=window, shape=shape, scaling=0.4, **options)


def inputs(tokens: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(some(2, n, tokens, d, seed=seed + n + d, dtype=dtype) for n, d in ((H, D), (G, D), (G, V)))


def exactly(spec: WindowLinear) -> WindowLinear:
    """The same operation with parameters in fp64."""

    def wide(x: Any) -> Any:
        if isinstance(x, FeatureMap):
            made = FeatureMap(x.name, HEADS, C, "identity").double().requires_grad_(False)
            made.load_state_dict(x.state_dict())
            return made
        return x.double() if isinstance(x, Tensor) else x

    names = ("feature_q", "feature_k", "log_window_factor_H", "linear_factor_H")
    return replace(spec, **{name: wide(getattr(spec, name)) for name in names})


def truth(
    spec: WindowLinear, qkv: tuple[Tensor, ...], state: WindowLinearState | None, position: Tensor, commit: int
) -> tuple[Tensor, list[Any]]:
    """y of the tokens after `commit` (zeros for dead ones), and each row's state after `commit` tokens."""
    ys, states = [], []
    for b in range(position.shape[0]):
        here = None if state is None else state.map_batch(lambda x, b=b: x[b : b + 1])
        y, kept, follow = torch.zeros(1, H, position.shape[1], V, dtype=qkv[0].dtype), here, PAST
        for t in range(position.shape[1]):
            at = int(position[b, t])
            if at >= 0:
                here, follow = here if at == follow else None, at + 1
                one, where = (
                    [x[b : b + 1, :, t : t + 1] for x in qkv],
                    Layout(position_BT=position[b : b + 1, t : t + 1]),
                )
                y[:, :, t : t + 1], here = reference(*one, spec=spec, layout=where, state=here)
            kept = here if t + 1 == commit else kept
        ys.append(y)
        states.append(kept)
    return torch.cat(ys)[:, :, commit:], states


def unrolled(state: WindowLinearState, b: int) -> dict[str, Tensor]:
    """What matters of one row of a state: live ring tokens and sinks, the folded sum, what comes next."""
    following = int(state.next[b]) if isinstance(state.next, Tensor) else state.next
    return {
        "memory": torch.zeros(1) if state.memory_BHFV is None else state.memory_BHFV[b],
        "k": state.k_BGRD[b],
        "v": state.v_BGRV[b],
        "sink_k": torch.zeros(G, 0, D) if state.sink_k_BGND is None else state.sink_k_BGND[b, :, :following],
        "sink_v": torch.zeros(G, 0, V) if state.sink_v_BGNV is None else state.sink_v_BGNV[b, :, :following],
        "next": torch.tensor([following]),
    }


def state_gaps(actual: WindowLinearState, states: list[Any], spec: WindowLinear) -> dict[str, float]:
    """Of the sums, and of the rows that are still in the window (a ring may have dead slots in front)."""
    gaps = {"state": 0.0, "rows": 0.0}
    for b, expected in enumerate(states):
        mine, right = unrolled(actual, b), unrolled(expected, 0)
        following = int(right["next"])
        held = min(following - fold_boundary(following, spec.window, spec.shape), right["k"].shape[1])
        for state in (mine, right):
            state["k"], state["v"] = (state[n][:, state[n].shape[1] - held :] for n in ("k", "v"))
        gaps["state"] = max(gaps["state"], gap(mine["memory"], right["memory"]))
        gaps["rows"] = max(gaps["rows"], *(gap(mine[n], right[n]) for n in ("k", "v", "sink_k", "sink_v", "next")))
    return gaps


@torch.no_grad()
def case(
    spec: WindowLinear,
    *,
    dtype: torch.dtype = torch.float32,
    position: Tensor | None = None,
    commit: int = TAIL,
    fresh: bool = False,
    in_place: bool = False,
) -> dict[str, float]:
    """One call, from a state after a text unless `fresh`, against the reference; and the PyTorch road in `dtype`."""
    exact, state = exactly(spec), None
    early, late = inputs(PAST, dtype, 31), inputs(6, dtype, 41)
    if not fresh:
        _, state = window_linear(*early, spec=spec, layout=Layout())
    start = 0 if fresh else PAST
    at = torch.arange(start, start + 6).expand(2, -1) if position is None else position
    wide = None if state is None else state.map_batch(lambda x: x.double())
    y0, states = truth(exact, tuple(x.double() for x in late), wide, at, commit)
    layout = Layout(start) if position is None else Layout(position_BT=position)
    narrow = state if state is None or position is None else replace(state, next=torch.full((2,), PAST))
    with use_backend("reference"):
        y1, _ = window_linear(late[0][:, :, commit:], *late[1:], spec=spec, layout=layout, state=narrow, commit=commit)
    arguments = [padded(x.masked_fill((at < 0)[:, None, :, None], NAN)) for x in late]
    arguments[0] = arguments[0][:, :, commit:]
    held: Any = state
    if in_place and state is not None:
        held = WindowBuffers.of(state, spec, most=commit)
        for x in (held.k_BGCD, held.v_BGCV):  # what is not in the window is never read
            x.masked_fill_(x == 0, NAN)
    y, after = window_linear_steps(*arguments, spec=spec, layout=layout, state=held, commit=commit)
    results = {"y": gap(y, y0), "torch": gap(y1.masked_fill((at[:, commit:] < 0)[:, None, :, None], 0), y0)}
    if in_place:
        results["in_place"] = float(after is held)
        after = after.state(spec)
    return results | (state_gaps(after, states, spec) if commit else {"state": 0.0, "rows": float(after is not state)})


@torch.no_grad()
def across(backend: str, in_place: bool = False) -> dict[str, float]:
    """Documents that begin above position 0 go on in the next call, by the kernel and in PyTorch."""
    spec = (
        make_spec(3, "terraced", "elu", num_sinks=2)
        if backend == "terraced"
        else make_spec(7, backend, "elu", num_sinks=6)
    )
    _, state = window_linear(*inputs(PAST, torch.float32, 31), spec=spec, layout=Layout())
    late = inputs(12, torch.float32, 41)
    wide = state.map_batch(lambda x: x.double())
    y0, _ = truth(exactly(spec), tuple(x.double() for x in late), wide, LATER, 0)
    held: Any = WindowBuffers.of(state, spec, most=6) if in_place else state
    first, then = ([x[:, :, part] for x in late] for part in (slice(0, 6), slice(6, 12)))
    if in_place:  # then no document opens after the first token that has an output
        first[0], then[0] = first[0][:, :, 4:], then[0][:, :, 4:]
        y0 = y0[:, :, [4, 5, 10, 11]]
    y, held = window_linear_steps(*first, spec=spec, layout=Layout(position_BT=LATER[:, :6]), state=held)
    layout, middle = Layout(position_BT=LATER[:, 6:]), held.state(spec) if in_place else held
    other, _ = window_linear(*then, spec=spec, layout=layout, state=middle)
    z, after = window_linear_steps(*then, spec=spec, layout=layout, state=held)
    begin = (after.state(spec) if in_place else after).begin
    results = {"y": gap(torch.cat([y, z], 2), y0), "other": gap(other, y0[:, :, y.shape[2] :])}
    return results | {"begin": float((begin != torch.tensor([3, 1])).sum())}


@torch.no_grad()
def same_bits() -> dict[str, float]:
    """Cutting a text in other places changes no bit: one call, tail and new tokens, single steps in place."""
    spec = make_spec(2, "terraced", "exp", num_sinks=1)
    qkv = tuple(x[:1] for x in inputs(7, torch.float32, 51))
    _, state = window_linear(*(x[:1] for x in inputs(4, torch.float32, 31)), spec=spec, layout=Layout())
    whole, end = window_linear_steps(*qkv, spec=spec, layout=Layout(4), state=state)
    cut = [x[:, :, :5] for x in qkv]
    y, _ = window_linear_steps(cut[0][:, :, 3:], *cut[1:], spec=spec, layout=Layout(4), state=state, commit=3)
    differ = int((y != whole[:, :, 3:5]).sum())
    buffers = WindowBuffers.of(state, spec)
    kept = [buffers.next_B, buffers.k_BGCD, buffers.memory_BHFV]
    for t in range(7):
        one = [x[:, :, t : t + 1] for x in qkv]
        y, after = window_linear_steps(*one, spec=spec, layout=Layout(), state=buffers)
        differ += int((y != whole[:, :, t : t + 1]).sum())
    moved = sum(a is not b for a, b in zip(kept, [after.next_B, after.k_BGCD, after.memory_BHFV], strict=True))
    rolled = after.state(spec)
    differ += int((rolled.memory_BHFV != end.memory_BHFV).sum()) + int(rolled.next[0]) - 11
    differ += int((rolled.k_BGRD[:, :, -end.k_BGRD.shape[2] :] != end.k_BGRD).sum())
    return {"differ": float(differ), "moved": float(moved), "spread": whole.std().item()}


@torch.no_grad()
def cut_values() -> dict[str, float]:
    """Values in blocks, state in place: the normaliser is read by every block and written by the last."""
    whole, launch.WHOLE_TILE = launch.WHOLE_TILE, 16
    try:
        return case(make_spec(3, "sliding", "hedgehog"), in_place=True)
    finally:
        launch.WHOLE_TILE = whole


@torch.no_grad()
def branches() -> dict[str, float]:
    """Each branch by itself, and how far it is from both."""
    results, qkv, ys = {}, inputs(9, torch.float32, 31), {}
    for branch in ("window", "linear", "both"):
        spec = make_spec(3, "terraced", "elu", branch=branch)
        ys[branch], _ = reference(*qkv, spec=spec, layout=Layout())
        results[branch] = case(spec)["y"]
    return results | {"apart": min(gap(ys[branch], ys["both"]) for branch in ("window", "linear"))}


@torch.no_grad()
def dispatched() -> dict[str, float]:
    """The kernels by name, through mixers and cache contract: `use_backend("triton")` against the PyTorch road."""
    gaps: dict[str, float] = {}
    qkv, early = inputs(5, torch.float32, 61), inputs(9, torch.float32, 31)
    spec = make_spec(3, "sliding", "hedgehog")
    _, state = window_linear(*early, spec=spec, layout=Layout())
    call: dict[str, Any] = {"spec": spec, "layout": Layout(9), "state": state, "commit": 2}
    y0, s0 = window_linear(qkv[0][:, :, 2:], *qkv[1:], **call)
    with use_backend("triton"):
        y, s = window_linear(qkv[0][:, :, 2:], *qkv[1:], **call)
    gaps["window"] = max(gap(y, y0), gap(s.memory_BHFV, s0.memory_BHFV), gap(s.k_BGRD, s0.k_BGRD))
    for name in ("mamba", "mamba2", "gated_delta_net"):
        mixer = build(name, SQUARE if name == "mamba" else SHAPE, torch.float32, conv_taps=3)
        hidden = some(2, 8, 11, seed=5)
        _, state = mixer(hidden[:, :3], layout=Layout())
        raw, rest = mixer.project(hidden[:, 3:]), {"layout": Layout(3), "state": state, "commit": 2, "outputs": 3}
        y0, s0 = mixer.mix(*raw, **rest)
        with layer.use_backend("triton"):
            y, s = mixer.mix(*raw, **rest)
            _, none = mixer.mix(*raw, **rest, need_state=False)
        gaps[name] = max(gap(y, y0), gap(s.memory, s0.memory), gap(s.taps, s0.taps), float(none is not None))
    return gaps


def cases() -> dict[str, Callable[[], dict[str, float]]]:
    affine = {"linear_factor_H": torch.rand(H, generator=seeded(3))}
    return {
        "hedgehog, terraced, dead": lambda: case(
            make_spec(3, "terraced", "hedgehog", num_sinks=2, **affine), position=DEAD
        ),
        "gain, sliding, shared, dead, fp16": lambda: case(
            make_spec(2, "sliding", "gain", shared_shift=True, softcap=2.5), position=DEAD, dtype=HALF
        ),
        "hedgehog, terraced, fp16": lambda: case(make_spec(3, "terraced", "hedgehog"), dtype=HALF, commit=5),
        "t2r, sliding, documents": lambda: case(make_spec(3, "sliding", "t2r", num_sinks=1), position=DOCUMENTS),
        "exp, sliding, jumps": lambda: case(make_spec(3, "sliding", "exp"), position=JUMPS),
        "exp, terraced, fresh": lambda: case(make_spec(1, "terraced", "exp", num_sinks=1), fresh=True),
        "elu, no window, documents": lambda: case(make_spec(0, "sliding", "elu"), position=DOCUMENTS),
        "window of one": lambda: case(make_spec(1, "sliding", None, num_sinks=1), position=DEAD),
        "window alone, no tail": lambda: case(make_spec(4, "sliding", None, num_sinks=2), commit=0),
        "in place, dead": lambda: case(make_spec(3, "terraced", "t2r", num_sinks=2), position=DEAD, in_place=True),
        "in place, documents": lambda: case(make_spec(2, "sliding", "elu"), position=DOCUMENTS, in_place=True),
        "across, terraced": lambda: across("terraced"),
        "across, sliding": lambda: across("sliding"),
        "across, in place": lambda: across("sliding", in_place=True),
        "cut": cut_values,
        "same bits": same_bits,
        "branches": branches,
        "dispatched": dispatched,
    }


def main() -> None:
    quicken()
    poison()
    assert "lolcats" in MIXERS
    results: dict[str, Any] = {}
    for name, run in cases().items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        try:
            results[name] = run()
        except Exception:
            results[name] = {"error": traceback.format_exc()[-2500:]}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
