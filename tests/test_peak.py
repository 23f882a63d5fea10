"""Counting products, and the machine's peak."""

from __future__ import annotations

import torch
from benchmarks.peak import attention_flops, matmul_peak, product_flops


def test_products_are_counted_with_their_backward() -> None:
    a, b = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 7, 11, requires_grad=True)
    d_y = torch.randn(3, 5, 11)
    assert product_flops(lambda: a @ b) == 2 * 3 * 5 * 7 * 11
    assert product_flops(lambda: torch.autograd.grad(a @ b, [a, b], d_y)) == 3 * 2 * 3 * 5 * 7 * 11
    out = torch.zeros(3, 5, 11)
    with torch.no_grad():
        assert product_flops(lambda: out.baddbmm_(a, b)) == 2 * 3 * 5 * 7 * 11
        assert product_flops(lambda: torch.mm(a[0], b[0])) == 2 * 5 * 7 * 11
        assert product_flops(lambda: a * 2) == 0


def test_attention_is_counted_by_its_triangle() -> None:
    q = torch.zeros(2, 3, 13, 5)
    rows = sum(t + 1 for t in range(13)) * 2 * 3
    assert attention_flops(q, 7, backward=False) == rows * 2 * (5 + 7)
    assert attention_flops(q, 7, backward=True) == rows * (2 * (5 + 7) + 2 * (3 * 5 + 2 * 7))


def test_the_peak_is_a_speed() -> None:
    assert matmul_peak() > 0.1
