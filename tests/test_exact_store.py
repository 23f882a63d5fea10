"""The exact store of window + linear attention: its decisions token by token, its limits, its bytes."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import mixer, student_of, tiny
from models import text as text_ids
from pydantic import ValidationError
from torch import Tensor

import linearize
from linearize.errors import InputError
from linearize.mixers import AttentionShape
from linearize.modeling.inspect import inspect_model
from linearize.ops.layout import Layout
from linearize.ops.softmax import softmax_attention

H, G, D, V, T = 6, 3, 5, 7, 41
SHAPE = AttentionShape(num_heads=H, num_kv_heads=G, head_dim=D, value_dim=V, model_dim=30)
SCALING = 0.61


def build(**settings: Any) -> Any:
    torch.manual_seed(1)
    made = mixer(**settings).build(SHAPE).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def text(rows: int = 1, tokens: int = T) -> list[Tensor]:
    torch.manual_seed(2)
    norms = 1 + 2 * torch.rand(rows, 1, tokens, 1, dtype=torch.float64)
    return [norms * torch.randn(rows, n, tokens, d, dtype=torch.float64) for n, d in ((H, D), (G, D), (G, V))]


def token_by_token(made: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[list[set[int]]], Tensor]:
    """Outputs `[H, T, V]`, the positions stored after each token by group, and the normaliser of the folded sum."""
    spec = made.spec(scaling=SCALING, softcap=None, branch="both").resolved()
    window, sinks, pairs, ratio = spec.window, spec.num_sinks, spec.store, H // G
    phi_q, phi_k = spec.features_q(q)[0], spec.features_k(k)[0]
    sums = [torch.zeros(phi_k.shape[-1], V + 1, dtype=torch.float64) for _ in range(H)]
    stored: list[list[int]] = [[] for _ in range(G)]
    history, ys = [], torch.zeros(H, T, V, dtype=torch.float64)
    value = torch.cat([v[0], torch.ones(G, T, 1, dtype=torch.float64)], -1)
    for n in range(T):
        near = [i for i in range(n + 1) if n // window - i // window < 2 or i < sinks]
        for head in range(H):
            group = head // ratio
            seen = sorted(near + stored[group])
            s = torch.stack([q[0, head, n] @ k[0, group, i] for i in seen]) * SCALING
            m = s.max().clamp(min=0) if spec.shared_shift else s.max()
            p = (s - m + spec.log_window_factor_H[head]).exp()
            total = p @ value[group][seen]
            linear = phi_q[head, n] @ sums[head]
            total = total + linear * ((-m).exp() if spec.shared_shift else 1)
            ys[head, n] = total[:-1] / total[-1]
        if (n + 1) % window == 0 and n + 1 >= 2 * window:  # a block leaves
            first = n + 1 - 2 * window
            for group in range(G):
                heads = range(group * ratio, (group + 1) * ratio)
                leavers = [i for i in range(first, first + window) if i >= sinks]
                errors = {}
                candidates = stored[group] + leavers
                for i in candidates:
                    errors[i] = 0.0
                    for head in heads:
                        recalled = phi_k[head, i] @ sums[head]
                        recall = recalled[:-1] / recalled[-1] if recalled[-1] != 0 else recalled[:-1]
                        errors[i] += float((recall - v[0, group, i]).square().sum())
                for i in candidates:
                    older = [float((v[0, group, j] - v[0, group, i]).square().sum()) for j in candidates if j < i]
                    errors[i] = min([errors[i], *(ratio * distance for distance in older)])
                rounded = {i: float(torch.tensor(error).bfloat16()) for i, error in errors.items()}
                stay = sorted(errors, key=lambda i: (-rounded[i], i))[:pairs]
                for i in set(errors) - set(stay):
                    for head in heads:
                        sums[head] = sums[head] + torch.outer(phi_k[head, i], value[group, i])
                stored[group] = sorted(stay)
        history.append([set(positions) for positions in stored])
    return ys, history, torch.stack([x[:, -1] for x in sums])


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 3, "num_sinks": 1, "store": 5, "shift": "shared"},
        {"window": 4, "feature_map": "gain", "store": 3},
        {"window": 2, "num_sinks": 2, "store": 9, "feature_map": "t2r", "shift": "shared"},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_decision_token_by_token(settings: dict[str, Any]) -> None:
    made, (q, k, v) = build(**settings), text()
    expected, history, folded = token_by_token(made, q, k, v)
    y, state = made(q, k, v, scaling=SCALING, layout=Layout())
    torch.testing.assert_close(y[0], expected, rtol=1e-9, atol=1e-9)
    for group in range(G):
        positions = {int((k[0, group] == key).all(-1).nonzero()) for key in state.store_k_BGPD[0, group]}
        assert positions == history[-1][group]
    torch.testing.assert_close(state.memory_BHFV[0, :, :, -1], folded, rtol=1e-9, atol=1e-9)
    replaced = [a - b for turn in pairwise(history) for a, b in zip(*turn, strict=True)]
    assert any(replaced)  # what was stored gave way to something better
    without = build(**{**settings, "store": 0})
    assert (without(q, k, v, scaling=SCALING, layout=Layout())[0][0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("shift", ["window", "shared"])
@torch.no_grad()
def test_a_store_that_holds_everything_is_softmax_attention(shift: str) -> None:
    made, (q, k, v) = build(window=3, num_sinks=1, store=T, shift=shift), text(rows=2)
    y, state = made(q, k, v, scaling=SCALING, layout=Layout())
    torch.testing.assert_close(y, softmax_attention(q, k, v, scaling=SCALING, layout=Layout()))
    assert not state.memory_BHFV.any()


def test_gradients_through_stored_and_folded_tokens() -> None:
    made, inputs = build(window=2, num_sinks=1, store=3, shift="shared"), [x[:, :, :13] for x in text()]
    leaves = [x.clone().requires_grad_() for x in inputs]

    def run(*qkv: Tensor) -> Tensor:
        y: Tensor = made(*qkv, scaling=SCALING, layout=Layout())[0]
        return y

    assert torch.autograd.gradcheck(run, leaves)
    y = run(*leaves)
    y[:, :, -1].square().sum().backward()
    early = leaves[2].grad[:, :, 1:8].abs().sum((0, 3))
    assert bool((early > 0).all())  # of tokens far beyond the window, stored or folded
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.parameters())


@torch.no_grad()
def test_bytes_are_those_of_the_cost() -> None:
    made = build(window=4, num_sinks=1, store=6).float()
    inputs = [x.float() for x in text()]
    _, state = made(*inputs, scaling=SCALING, layout=Layout())
    ring = state.k_BGRD.shape[2]
    missing = (2 * 4 - 1 - ring) * G * (D + V) * 4  # of a ring that is not full at this position
    assert state.num_bytes + missing == made.cost(4).state_bytes
    assert made.cost(4).state_bytes - build(window=4, num_sinks=1).cost(4).state_bytes == 6 * G * (D + V) * 4


@torch.no_grad()
def test_decoding_in_16_bits_keeps_the_store_in_16_bits() -> None:
    """Also once blocks have left: operations are in fp32, what waits between them is not."""
    made, inputs = build(window=4, num_sinks=1, store=6).bfloat16(), [x.bfloat16() for x in text()]
    state = None
    for t in range(T):
        now = (x[:, :, t : t + 1] for x in inputs)
        _, state = made(*now, scaling=SCALING, layout=Layout(t), state=state)
    assert {x.dtype for x in (state.store_k_BGPD, state.store_v_BGPV, state.k_BGRD)} == {torch.bfloat16}
    assert state.memory_BHFV.dtype == torch.float32


@torch.no_grad()
def test_branches_alone_have_no_store() -> None:
    made, (q, k, v) = build(window=3, num_sinks=1, store=5), text()
    for branch in ("window", "linear"):
        alone = [build(window=3, num_sinks=1, store=n) for n in (5, 0)]
        ys = [m(q, k, v, scaling=SCALING, layout=Layout(), branch=branch)[0] for m in alone]
        differ = (ys[0] - ys[1]).abs().max() > 1e-6
        assert differ == (branch == "linear")  # the sum lacks what is stored
    whole = made(q, k, v, scaling=SCALING, layout=Layout())[1]
    for branch in ("window", "linear"):
        state = made(q, k, v, scaling=SCALING, layout=Layout(), branch=branch)[1]
        torch.testing.assert_close(state.store_k_BGPD, whole.store_k_BGPD)


@pytest.mark.parametrize("settings", [{"window": 0}, {"window": 5, "window_shape": "sliding"}], ids=str)
def test_a_store_without_a_terraced_window_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="terraced"):
        mixer(**settings, store=4)
    with pytest.raises(ValidationError):
        mixer(store=-1)


@torch.no_grad()
def test_a_student_trained_without_a_store_is_loaded_one_when_it_is_loaded(tmp_path: Path) -> None:
    """It writes what a student made with one writes, and counts its bytes."""
    teacher = tiny("llama")
    made = student_of(teacher, [mixer(num_sinks=1), None, mixer(num_sinks=1, store=6)])
    made.save_pretrained(tmp_path)
    ids = text_ids(2, 31)
    expected, before = made(ids).logits, inspect_model(tmp_path)["state_bytes"]
    loaded = linearize.load(tmp_path, store=6)
    assert [None if m is None else m.store for m in loaded.config.mixers()] == [6, None, 6]
    actual = loaded(ids).logits
    assert (actual - expected).abs().max() > 1e-4
    loaded.save_pretrained(tmp_path / "loaded")
    torch.testing.assert_close(linearize.load(tmp_path / "loaded")(ids).logits, actual)
    assert inspect_model(tmp_path / "loaded")["state_bytes"] > before
    greedy = loaded.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(greedy, loaded.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False))
    loaded.set_store(0)
    assert (loaded(ids).logits - expected).abs().max() > 1e-4


@pytest.mark.parametrize(("plan", "pairs"), [("mamba2", 4), ("sliding_window", 4), ("lolcats", -1), ("linear", 4)])
def test_a_store_for_what_has_none_is_one_line(plan: str, pairs: int) -> None:
    entry = mixer(window=0) if plan == "linear" else mixer(plan)
    student = student_of(tiny("llama"), entry)
    with pytest.raises(InputError) as raised:
        student.set_store(pairs)
    assert "\n" not in str(raised.value) and str(pairs) in str(raised.value)


@pytest.mark.parametrize(("shift", "warnings_expected"), [("window", 1), ("shared", 0)])
def test_a_store_on_another_scale_than_the_sum_is_announced(shift: str, warnings_expected: int) -> None:
    student = student_of(tiny("llama"), mixer(shift=shift))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        student.set_store(4)
        student.set_store(0)
    assert len([one for one in caught if "store 4" in str(one.message)]) == warnings_expected
