"""Which backend runs where, and why; what happens where a backend does not build."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import linearize.ops.recurrent.decay_linear as decay_backends
import linearize.ops.recurrent.gated_delta as delta_backends
import linearize.ops.recurrent.selective_scan as scan_backends
from linearize.errors import InputError
from linearize.mixers import MIXERS, AttentionShape
from linearize.mixers.feature_maps import FeatureMap
from linearize.ops import dispatch, triton, window_linear
from linearize.ops.dispatch import Call, Dispatcher, Rule, always, more_than
from linearize.ops.layout import Layout
from linearize.ops.recurrent import decay_linear, gated_delta, layer_steps, selective_scan
from linearize.ops.window_linear import WindowLinear
from linearize.ops.window_linear import backends as window_backends

SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=6, value_dim=5, model_dim=7)
PACKED = Layout(position_BT=torch.tensor([[0, 1, 0]]))
GAPS = Layout(position_BT=torch.tensor([[5, -1, 6]]))
WINDOW = WindowLinear(window=3, shape="sliding", scaling=1.0)


def choice(module: Any, **change: Any) -> str:
    call: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "tokens": 4, **change}
    kinds = {scan_backends: scan_backends.ScanCall, window_backends: window_backends.WindowCall}
    kinds[layer_steps] = layer_steps.LayerCall
    window = {"spec": WINDOW, "cursor": "same"}
    extra = {scan_backends: {"state_dim": 16}, window_backends: window, layer_steps: {"taps": 4}}
    backend, why = module.choice(kinds.get(module, Call)(**{**extra.get(module, {}), **call}))
    assert why and "\n" not in why
    return backend


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("has_triton", "has_fla"):
        monkeypatch.setattr(triton, name, lambda: True)
    monkeypatch.setattr(scan_backends, "kernel", lambda: print)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("module", "one", "some", "many", "elsewhere"),
    [
        (decay_backends, "triton", "triton", "fla", ["reference", "multi_token", "chunked"]),
        (delta_backends, "triton", "triton", "fla", ["reference", "multi_token", "chunked"]),
        (scan_backends, "triton", "triton", "chunked", ["reference", "multi_token", "chunked"]),
        (window_backends, "triton", "triton", "triton_chunks", ["step", "multi_token", "chunked"]),
        (layer_steps, "triton", "triton", "operations", ["operations"] * 3),
    ],
)
def test_few_tokens_on_a_gpu_take_the_kernel(module: Any, one: str, some: str, many: str, elsewhere: list[str]) -> None:
    assert [choice(module, tokens=n) for n in (1, 8, 33)] == [one, some, many]
    assert [choice(module, tokens=n, device="cpu") for n in (1, 8, 33)] == elsewhere
    without = choice(module, device="cpu")
    for change in ({"gradients": True}, {"dtype": torch.float64}):
        assert choice(module, **change) == without


@pytest.mark.usefixtures("installed")
def test_what_each_operation_looks_at_besides() -> None:
    assert choice(decay_backends, tokens=99, layout=PACKED) == "fla"  # documents are sequences
    static = Layout(position_BT=torch.arange(99)[None], tail=3)
    assert choice(delta_backends, tokens=99, layout=static) == "chunked"  # whose positions nobody reads
    assert choice(scan_backends, tokens=99, dtype=torch.float32) == "mamba_ssm"
    assert choice(layer_steps, taps=9) == "operations"
    assert choice(window_backends, device="cpu", tokens=1, cursor="same") == "step"
    assert choice(window_backends, device="cpu", tokens=1, cursor="rows") == "reference"
    assert choice(window_backends, tokens=99, layout=GAPS) == "reference"
    known = FeatureMap("t2r", SHAPE, 3, "identity")
    for feature, backend in ((known, "triton"), (torch.exp, "reference")):
        spec = WindowLinear(window=3, shape="sliding", scaling=1.0, feature_q=feature, feature_k=feature)
        assert choice(window_backends, spec=spec, cursor="rows") == backend


def test_without_triton_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "has_triton", lambda: False)
    backend, why = decay_backends.choice(Call(device="cuda", dtype=torch.float32, tokens=3))
    assert backend == "multi_token" and "not triton: triton is not installed" in why
    with decay_linear.use_backend("reference"):
        assert decay_backends.choice(Call(device="cpu", dtype=torch.float32, tokens=99)) == ("reference", "forced")


def dispatcher() -> Dispatcher:
    return Dispatcher("test", [Rule("fast", more_than(3), "fast", built=True), Rule("slow", always, "slow")])


def invoke(backend: str) -> str:
    if backend == "fast":
        raise RuntimeError("ptxas is missing\nno such file")
    return backend


def test_a_backend_that_does_not_build_gives_way_with_one_warning() -> None:
    made, call = dispatcher(), Call(device="cuda", dtype=torch.float32, tokens=2)
    assert made.choice(call)[0] == "fast"
    with pytest.warns(UserWarning, match=r"test: not fast: .*RuntimeError: no such file.*slow runs instead"):
        assert made.run(call, invoke) == "slow"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.run(call, invoke) == "slow"
    backend, why = made.choice(call)
    assert backend == "slow" and "does not build here" in why


@pytest.mark.parametrize("error", [InputError("given"), AssertionError("ours"), torch.OutOfMemoryError("full")])
def test_other_failures_are_not_taken_for_that(error: Exception) -> None:
    made = dispatcher()

    def fail(backend: str) -> str:
        raise error

    with pytest.raises(type(error)):
        made.run(Call(device="cuda", dtype=torch.float32, tokens=2), fail)
    assert not made.broken


def test_a_forced_backend_that_fails_says_so() -> None:
    made = dispatcher()
    with made.use("fast"), pytest.raises(RuntimeError, match="ptxas"):
        made.run(Call(device="cpu", dtype=torch.float32, tokens=9), invoke)
    assert made.forced is None and not made.broken


@pytest.mark.parametrize("name", ["mamba", "mamba2", "gated_delta_net"])
def test_a_mixer_goes_on_where_its_kernel_does_not_build(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=6, value_dim=6, model_dim=7)
    mixer: Any = MIXERS[name]().build(shape)
    hidden, asked = torch.randn(2, 3, 7), []

    def fails(*_: Any, **__: Any) -> None:
        asked.append(name)
        raise OSError("no compiler")

    monkeypatch.setattr(type(mixer), "by_kernel", fails)
    monkeypatch.setattr(layer_steps, "DISPATCH", Dispatcher("layer", [Rule("triton", always, "", built=True), *RULES]))
    with torch.no_grad(), pytest.warns(UserWarning, match="no compiler"):
        output, _ = mixer(hidden, layout=Layout())
    monkeypatch.undo()
    with torch.no_grad():
        expected, _ = mixer(hidden, layout=Layout())
    assert asked == [name] and torch.equal(output, expected)


RULES = [Rule("operations", always, "")]


def test_every_operation_forces_backends_of_its_own() -> None:
    modules = [decay_linear, gated_delta, selective_scan, window_linear, layer_steps]
    assert len({m.DISPATCH.operation for m in modules}) == len(modules)
    with decay_linear.use_backend("multi_token"):
        assert [m.DISPATCH.forced for m in modules] == ["multi_token", None, None, None, None]
    assert isinstance(dispatch.wants_gradients(torch.ones(1)), bool)
