"""Products of bf16 inputs on CPUs with bf16 units: used there only, and as exact as softmax attention.

The units round the factors of a product and add up in fp32; here that is done by hand, for CPUs that have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_window_linear import inputs, make_spec
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.ops import matmul as products
from linearize.ops.layout import Layout
from linearize.ops.matmul import bf16_products, whole_products
from linearize.ops.window_linear import use_backend, window_linear
from linearize.training.step import bf16_pays

SETTING = getattr(torch.backends.mkldnn, "matmul", None)
PRODUCTS = {torch.ops.aten.bmm.default: 0, torch.ops.aten.baddbmm.default: 1, torch.ops.aten.baddbmm.out: 1}

pytestmark = pytest.mark.skipif(SETTING is None, reason="torch before 2.9 has no such setting")


class Units(TorchDispatchMode):
    """A CPU with bf16 units; counts the products that they did, and those that they did not."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = self.whole = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and args[-1].dtype == torch.float32:
            if SETTING.fp32_precision == "bf16":
                first = PRODUCTS[func]
                args = (*args[:first], *(x.bfloat16().float() for x in args[first:]))
                self.rounded += 1
            else:
                self.whole += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def units(monkeypatch: pytest.MonkeyPatch, there: bool = True) -> Iterator[Units]:
    monkeypatch.setattr(products, "has_bf16_units", lambda: there)
    with Units() as mode:
        yield mode


def outputs(backend: str, dtype: torch.dtype, **options: Any) -> list[torch.Tensor]:
    spec = make_spec(8, "terraced", **options)
    spec = type(spec)(**{k: x.to(torch.float64 if dtype == torch.float64 else torch.float32)
                         if isinstance(x, torch.nn.Module) else x for k, x in spec.__dict__.items()})  # fmt: skip
    leaves = [x.to(torch.bfloat16).to(dtype).requires_grad_(True) for x in inputs(203)]
    with use_backend(backend):
        y, _ = window_linear(*leaves, spec=spec, layout=Layout(), need_state=False)
    torch.manual_seed(5)
    return [y, *torch.autograd.grad(y, leaves, torch.randn(y.shape).bfloat16().to(dtype))]


def softmax(dtype: torch.dtype) -> list[torch.Tensor]:
    leaves = [x.to(torch.bfloat16).to(dtype).requires_grad_(True) for x in inputs(203)]
    y = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    torch.manual_seed(5)
    return [y, *torch.autograd.grad(y, leaves, torch.randn(y.shape).bfloat16().to(dtype))]


def errors(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [
        float((x.detach().double() - y).norm() / y.norm())
        for x, y in zip(actual, map(torch.Tensor.detach, exact), strict=True)
    ]


@pytest.mark.parametrize("options", [{"shared": True, "sinks": 3}, {}])
def test_bf16_units_lose_no_more_than_twice_what_softmax_attention_loses(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    allowed = errors(softmax(torch.bfloat16), softmax(torch.float64))
    with units(monkeypatch) as mode:
        actual = outputs("chunked", torch.bfloat16, **options)
    assert mode.rounded > 10 and mode.whole > 0, "gradients of scores and queries stay whole"
    exact = outputs("reference", torch.float64, **options)
    for mine, its in zip(errors(actual, exact), allowed, strict=True):
        assert mine < 2 * its


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_inputs_are_multiplied_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    with units(monkeypatch) as mode:
        outputs("chunked", dtype)
    assert mode.rounded == 0 and mode.whole > 10


def test_without_such_units_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with units(monkeypatch, there=False) as mode:
        outputs("chunked", torch.bfloat16)
    assert mode.rounded == 0 and mode.whole > 10


@pytest.mark.parametrize(
    ("amx", "avx512", "name", "faster"),
    [
        (True, True, "Intel(R) Xeon(R) Processor", True), (False, True, "Intel(R) Xeon(R) Processor", False),
        (False, True, "AMD EPYC 9B14", True), (False, False, "AMD EPYC 7B13", False),
    ],
)  # fmt: skip
def test_bf16_pays_on_a_cpu_that_has_such_units(
    amx: bool, avx512: bool, name: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(products, "cpu_name", lambda: name)
    products.has_bf16_units.cache_clear()
    try:
        assert products.has_bf16_units() == bf16_pays(torch.device("cpu")) == faster
    finally:
        products.has_bf16_units.cache_clear()


def test_the_setting_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bf16_units", lambda: True)
    before = SETTING.fp32_precision
    with pytest.raises(ZeroDivisionError), bf16_products(torch.bfloat16) as taken:
        assert taken and SETTING.fp32_precision == "bf16"
        _ = 1 / 0
    assert SETTING.fp32_precision == before
    with bf16_products(torch.bfloat16), whole_products():
        assert SETTING.fp32_precision == "ieee"
    assert SETTING.fp32_precision == before
    with bf16_products(torch.float16) as taken:
        assert not taken and SETTING.fp32_precision == before
