"""Head sizes, dtypes and windows that a kernel does not take go to the backend that does; `inspect --backends` says so.

A backend that somebody forces says in one line why it cannot do a call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import student_of, tiny

import linearize.ops.recurrent.selective_scan as scan_backends
from linearize.cli.main import main
from linearize.errors import InputError
from linearize.mixers import MIXERS, AttentionShape
from linearize.modeling.inspect import inspect_backends
from linearize.ops import triton, window_linear
from linearize.ops.dispatch import Query
from linearize.ops.layout import Layout
from linearize.ops.recurrent import decay_linear, gated_delta, layer_steps, selective_scan

CALLS = {
    "decode": {"tokens": 1, "past": True},
    "verify": {"tokens": 9, "past": True},
    "prefill": {"tokens": 4096},
    "training": {"tokens": 1024, "gradients": True},
}
WINDOWED = ("lolcats", "sliding_window", "gla")
LAYERS = ("mamba", "mamba2", "gated_delta_net")
PLAIN = {"reference", "step", "multi_token", "chunked", "operations"}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("has_triton", "has_fla"):
        monkeypatch.setattr(triton, name, lambda: True)
    monkeypatch.setattr(scan_backends, "kernel", lambda: print)


def backends(
    name: str, call: str, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, dim: int = 64, **config: Any
) -> dict[str, tuple[str, str]]:
    """Of each operation of a mixer the backend and why."""
    shape = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=dim, value_dim=dim, model_dim=4 * dim)
    with torch.device("meta"):
        mixer = MIXERS[name](**config).build(shape)
    asked = Query(device=device, dtype=dtype, **CALLS[call])
    return {dispatcher.operation: dispatcher.choice(seen) for dispatcher, seen in mixer.operations(asked)}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", sorted(MIXERS))
def test_on_a_cpu_every_mixer_takes_backends_in_pytorch_whatever_its_heads(name: str, call: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for dim in (64, 80, 96, 192, 256):
            for backend, why in backends(name, call, device="cpu", dtype=dtype, dim=dim).values():
                assert backend in PLAIN and "\n" not in why


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_fp64_is_computed_in_pytorch_and_halves_by_kernels(name: str) -> None:
    for call in CALLS:
        for backend, why in backends(name, call, dtype=torch.float64).values():
            assert backend in PLAIN and (
                "float64 is computed in full" in why or "it takes fp32" in why or ": more than" in why
            )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert {backend for backend, _ in list(backends(name, "decode", dtype=dtype).values())[:1]} == {"triton"}


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize(
    ("dim", "backend"),
    [
        (64, "triton_chunks"),
        (80, "triton_chunks"),
        (96, "triton_chunks"),
        (128, "triton_chunks"),
        (129, "chunked"),
        (192, "chunked"),
        (256, "chunked"),
    ],
)
def test_wide_heads_are_prefilled_in_pytorch(name: str, dim: int, backend: str) -> None:
    for call in ("prefill", "training"):
        chosen, why = backends(name, call, dim=dim)["window_linear"]
        assert chosen == backend and (backend == "triton_chunks" or "not triton_chunks: heads of more than 128" in why)
    assert backends(name, "decode", dim=dim)["window_linear"][0] == "triton"


@pytest.mark.parametrize(
    ("window", "shape", "backend"),
    [
        (64, "terraced", "triton_chunks"),
        (128, "terraced", "triton_chunks"),
        (80, "terraced", "chunked"),
        (128, "sliding", "triton_chunks"),
        (129, "sliding", "chunked"),
        (1024, "terraced", "chunked"),
    ],
)
def test_windows_too_large_for_a_kernel_go_to_pytorch(window: int, shape: str, backend: str) -> None:
    chosen, why = backends("lolcats", "prefill", window=window, window_shape=shape)["window_linear"]
    assert chosen == backend and (
        backend == "triton_chunks" or "not triton_chunks: a window whose reach is more than 128" in why
    )


@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_with_many_taps_go_to_the_operations(name: str) -> None:
    assert backends(name, "decode", conv_taps=8)["layer"][0] == "triton"
    backend, why = backends(name, "decode", conv_taps=9)["layer"]
    assert backend == "operations" and "not triton: a convolution of more than 8 taps" in why


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inspect_says_it_in_words(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny(head_dim=192, num_attention_heads=2, num_key_value_heads=1)
    student_of(teacher, [MIXERS["lolcats"](), None, None]).save_pretrained(tmp_path)
    rows = {row["call"]: row for row in inspect_backends(tmp_path, device=device)["backends"]}
    why = "heads of more than 128" if device == "cuda" else "the tensors are on cpu"
    for call in ("prefill", "training"):
        assert rows[call]["backend"] == "chunked" and f"not triton_chunks: {why}" in rows[call]["why"]
    assert rows["decode"]["backend"] == ("triton" if device == "cuda" else "decoder")
    assert main(["inspect", str(tmp_path), "--backends", "--device", device]) == 0
    assert why in " ".join(capsys.readouterr().out.split())


def window(**options: Any) -> window_linear.WindowLinear:
    return window_linear.WindowLinear(**{"window": 4, "shape": "sliding", "scaling": 1.0, **options})


def attend(
    backend: str, *, dim: int = 6, tokens: int = 3, layout: Layout | None = None, dtype: Any = None, **options: Any
) -> Any:
    q, k, v = (torch.randn(1, n, tokens, dim, dtype=dtype) for n in (2, 1, 1))
    with window_linear.use_backend(backend):
        return window_linear.window_linear(q, k, v, spec=window(**options), layout=layout or Layout())


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ("triton", {}, "the tensors are on cpu"),
        ("triton_chunks", {}, "the tensors are on cpu"),
        ("step", {}, "not one token after the same state"),
        ("multi_token", {"feature_q": torch.exp, "feature_k": torch.exp}, "not tokens after the same state"),
        ("in_place", {}, "no buffers of a static cache"),
    ],
)
def test_a_forced_backend_says_in_one_line_why_it_cannot(backend: str, change: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        attend(backend, **change)
    message = str(caught.value)
    assert (
        message.startswith(f"window_linear: the backend {backend!r} is forced")
        and "\n" not in message
        and "chunked" in message
    )


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ("triton", {"dtype": torch.float64}, "float64 is computed in full"),
        ("triton", {"feature_q": torch.exp, "feature_k": torch.exp}, "a feature map that the kernel does not know"),
        ("triton_chunks", {"dim": 136}, "heads of more than 128"),
        ("triton_chunks", {"window": 200}, "a window whose reach is more than 128"),
        ("triton_chunks", {"layout": Layout(position_BT=torch.tensor([[0, -1, 1]]))}, "dead tokens between others"),
    ],
)
def test_a_forced_kernel_says_so_in_the_interpreter_too(
    backend: str, change: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match=reason):
        attend(backend, **change)


def test_other_operations_say_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, g = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5), -torch.rand(1, 2, 3)
    static = Layout(position_BT=torch.tensor([[0, 1, 2]]), tail=0)
    with decay_linear.use_backend("triton"), pytest.raises(InputError, match="on cpu"):
        decay_linear.decay_linear(q, k, v, g, layout=Layout())
    with gated_delta.use_backend("fla"), pytest.raises(InputError, match="a static call"):
        gated_delta.gated_delta(q, k, v, g, g.exp(), layout=static)
    scan = (
        torch.randn(1, 3, 4),
        torch.rand(1, 3, 4),
        -torch.rand(4, 2),
        torch.randn(1, 3, 2, 2),
        torch.randn(1, 3, 2, 2),
    )
    with selective_scan.use_backend("mamba_ssm"), pytest.raises(InputError, match="begins from no state"):
        selective_scan.selective_scan(*scan, layout=Layout(3), state=torch.zeros(1, 4, 2))
    mixer: Any = MIXERS["mamba2"]().build(
        AttentionShape(num_heads=2, num_kv_heads=1, head_dim=4, value_dim=4, model_dim=8)
    )
    with layer_steps.use_backend("triton"), pytest.raises(InputError, match="on cpu"):
        mixer(torch.randn(1, 3, 8), layout=Layout())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with decay_linear.use_backend("triton"), pytest.raises(InputError, match="no gradients"):
        decay_linear.decay_linear(q.requires_grad_(), k, v, g, layout=Layout())


def test_a_backend_that_does_not_exist_cannot_be_forced() -> None:
    with pytest.raises(InputError, match=r"unknown backend of window_linear 'chunkd': did you mean 'chunked'"):
        window_linear.use_backend("chunkd").__enter__()
    assert window_linear.DISPATCH.forced is None
