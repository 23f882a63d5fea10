"""Forward and backward of recurrent layers against transformers' own PyTorch layers: same sizes, same run.

mamba2 and gated_delta_net carry the very weights of the layer they are compared with, and their outputs are compared
before anything is timed. With fewer key/value heads than query heads (as teachers have them) ours projects those alone,
and transformers' layer, which knows none, holds their rows repeated: the same function. Mamba's projections are cut
differently from transformers' (C, B and x come from the hidden states): the same width, state and convolution, random
weights; its own backward is quadratic, so it is timed on a shorter text. `core` is what is between the projections,
which both sides compute with the same matrix products: the recurrence with its step sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import SEED, parser, publish
from linearize.errors import unknown
from linearize.evaluation.speed.running import Timing, interleaved
from linearize.mixers import MIXERS, AttentionShape, LayerMixer
from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear import decay_linear
from linearize.ops.recurrent.gated_delta import gated_delta

Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Size:
    """`tokens`, `width` of the hidden states, `heads` of `dim`, and our `kv_heads`."""

    tokens: int
    width: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def shape(self) -> AttentionShape:
        """The attention that the layer replaces."""
        dim, width = self.dim, self.width
        return AttentionShape(
            num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=dim, value_dim=dim, model_dim=width
        )

    def projected(self, *rows: tuple[int, bool]) -> Tensor:
        """Which of our projection's rows each row of transformers' is: blocks of a number of columns per query head,
        of which ours has one per key/value head where the block is shared."""
        results, first = [], 0
        for dim, shared in rows:
            head = torch.arange(self.heads) // (self.heads // self.kv_heads if shared else 1)
            results.append((first + head[:, None] * dim + torch.arange(dim)).flatten())
            first += dim * (self.kv_heads if shared else self.heads)
        return torch.cat(results)


def measure(name: str, size: Size, repeats: int) -> list[dict[str, Any]]:
    """Rows of one mixer: the layer and, where there is a counterpart, the recurrence alone.

    Raises:
        InputError: no such comparison.
        AssertionError: the two layers do not compute the same.
    """
    if name not in LAYERS:
        raise unknown("recurrent mixer", name, LAYERS)
    torch.manual_seed(SEED)
    ours, theirs, same = LAYERS[name](size)
    x, d_y = torch.randn(1, size.tokens, size.width), torch.randn(1, size.tokens, size.width)
    difference = _difference(ours, theirs, x) if same else None
    assert difference is None or difference < 1e-3, f"{name} and transformers differ by {difference}"
    layout = Layout()
    runs = {
        "ours": _gradients(lambda x: ours(x, layout=layout, need_state=False)[0], x, ours, d_y),
        "transformers": _gradients(theirs, x, theirs, d_y),
        "projections": _projections(ours, x),
    }
    rows = [_row(name, "layer", size, interleaved(runs, repeats), difference)]
    if name in CORES:
        rows.append(_row(name, "core", size, interleaved(CORES[name](size), repeats), None))
    return rows


def _row(name: str, part: str, size: Size, times: dict[str, Timing], difference: float | None) -> dict[str, Any]:
    ours, theirs = times["ours"], times["transformers"]
    return {
        "mixer": name,
        "part": part,
        **vars(size),
        "times": {key: vars(timing) for key, timing in times.items()},
        "tokens_per_second": {key: size.tokens / timing.seconds for key, timing in times.items()},
        "speedup": theirs.seconds / ours.seconds,
        "speedup_cpu": theirs.cpu_seconds / ours.cpu_seconds,
        "most": theirs.cpu_seconds / times["projections"].cpu_seconds if "projections" in times else None,
        "largest_difference": difference,
    }


def _gradients(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module, d_y: Tensor) -> Run:
    inputs = x.clone().requires_grad_()
    leaves = [inputs, *module.parameters()]
    return lambda: torch.autograd.grad(function(inputs), leaves, d_y)


def _projections(ours: LayerMixer, x: Tensor) -> Run:
    """Forward and backward of the layer's linear maps alone."""
    parts = [layer for layer in ours.modules() if isinstance(layer, nn.Linear)]
    inputs = [torch.randn(1, x.shape[1], layer.in_features).requires_grad_() for layer in parts]
    d_outputs = [torch.randn(1, x.shape[1], layer.out_features) for layer in parts]
    leaves = [*inputs, *(p for layer in parts for p in layer.parameters())]

    def run() -> Any:
        outputs = [layer(hidden) for layer, hidden in zip(parts, inputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, d_outputs)

    return run


@torch.no_grad()
def _difference(ours: LayerMixer, theirs: nn.Module, x: Tensor) -> float:
    expected = theirs(x)
    return float((ours(x, layout=Layout())[0] - expected).abs().max() / expected.abs().max())


def _mixer(name: str, size: Size, **settings: Any) -> LayerMixer:
    mixer = MIXERS[name](**settings).build(size.shape)
    assert isinstance(mixer, LayerMixer)
    return mixer


def _mamba2(size: Size) -> tuple[LayerMixer, nn.Module, bool]:
    from transformers import GraniteMoeHybridConfig
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

    config = GraniteMoeHybridConfig(
        hidden_size=size.width,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        num_attention_heads=size.heads,
        mamba_n_heads=size.heads,
        mamba_n_groups=size.heads,
        mamba_d_state=size.dim,
        mamba_d_head=size.dim,
        mamba_expand=_expand(size),
        rms_norm_eps=size.shape.norm_eps,
    )
    ours, theirs = _mixer("mamba2", size), GraniteMoeHybridMambaLayer(config, 0)
    weights = {name.replace("norm.weight", "norm_weight"): x for name, x in theirs.state_dict().items()}
    weights["conv_weight"] = weights.pop("conv1d.weight")[:, 0]
    weights["conv_bias"] = weights.pop("conv1d.bias")
    weights["dt_bias"], weights["A_log"] = ours.get_parameter("dt_bias"), ours.get_parameter("A_log")
    projection, dim = ours.get_parameter("in_proj.weight"), size.dim
    weights["in_proj.weight"] = projection
    rows = size.projected((dim, False), (dim, True), (dim, True), (dim, False), (1, False))
    copied = {"dt_bias": weights["dt_bias"], "A_log": weights["A_log"], "in_proj.weight": projection[rows]}
    theirs.load_state_dict(copied, strict=False)
    ours.load_state_dict(weights)
    return ours, theirs, True


def _gated_delta_net(size: Size) -> tuple[LayerMixer, nn.Module, bool]:
    from transformers import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    config = Qwen3_5TextConfig(
        hidden_size=size.width,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_value_heads=size.heads,
        linear_num_key_heads=size.heads,
        linear_key_head_dim=size.dim,
        linear_value_head_dim=size.dim,
        rms_norm_eps=size.shape.norm_eps,
    )
    ours, theirs = _mixer("gated_delta_net", size), Qwen3_5GatedDeltaNet(config, 0)  # type: ignore[arg-type]
    renamed = {"in_proj_qkv": "qkv_proj", "in_proj_z": "gate_proj", "in_proj_b": "beta_proj", "in_proj_a": "decay_proj"}
    weights = theirs.state_dict()
    for old, new in renamed.items():
        weights[f"{new}.weight"] = weights.pop(f"{old}.weight")
    weights["conv_weight"], weights["norm_weight"] = weights.pop("conv1d.weight")[:, 0], weights.pop("norm.weight")
    weights["qkv_proj.weight"] = projection = ours.get_parameter("qkv_proj.weight")
    rows = size.projected((size.dim, False), (size.dim, True), (size.dim, True))
    theirs.load_state_dict({"in_proj_qkv.weight": projection[rows]}, strict=False)
    ours.load_state_dict(weights)
    return ours, theirs, True


def _mamba(size: Size) -> tuple[LayerMixer, nn.Module, bool]:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(
        hidden_size=size.width, num_hidden_layers=1, state_size=min(16, size.dim), expand=_expand(size)
    )
    return _mixer("mamba", size), MambaMixer(config, 0), False


def _expand(size: Size) -> int:
    """Inner width over model width, which must be whole in transformers' configs."""
    expand, rest = divmod(size.heads * size.dim, size.width)
    assert rest == 0, f"{size.heads} heads of {size.dim} are no multiple of width {size.width}"
    return expand


def _heads(size: Size, count: int) -> list[Tensor]:
    return [torch.randn(1, size.tokens, size.heads, size.dim).requires_grad_() for _ in range(count)]


def _ssd(size: Size) -> dict[str, Run]:
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan

    x, B, C, d_y = *_heads(size, 3), torch.randn(1, size.tokens, size.heads, size.dim)
    dt = torch.rand(1, size.tokens, size.heads).mul(0.1).requires_grad_()
    A = torch.linspace(-16, -1, size.heads).requires_grad_()
    leaves, layout = [x, B, C, dt, A], Layout()

    def ours() -> Any:
        q, k, v, g = (w.transpose(1, 2) for w in (C, B * dt[..., None], x, dt * A))
        y, _ = decay_linear(q, k, v, g, layout=layout, need_state=False)
        return torch.autograd.grad(y.transpose(1, 2), leaves, d_y)

    return {
        "ours": ours,
        "transformers": lambda: torch.autograd.grad(mamba2_chunk_scan(x, dt, A, B, C, 256), leaves, d_y),
    }


def _delta(size: Size) -> dict[str, Run]:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    q, k, v, d_y = *_heads(size, 3), torch.randn(1, size.tokens, size.heads, size.dim)
    g = torch.rand(1, size.tokens, size.heads).mul(-0.5).requires_grad_()
    beta = torch.rand(1, size.tokens, size.heads).requires_grad_()
    leaves, layout = [q, k, v, g, beta], Layout()

    def unit(x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)

    def ours() -> Any:
        inputs = (w.transpose(1, 2) for w in (unit(q) * size.dim**-0.5, unit(k), v, g, beta))
        y, _ = gated_delta(*inputs, layout=layout, need_state=False)
        return torch.autograd.grad(y.transpose(1, 2), leaves, d_y)

    def theirs() -> Any:
        y, _ = torch_chunk_gated_delta_rule(unit(q), unit(k), v, g=g, beta=beta)
        return torch.autograd.grad(y, leaves, d_y)

    return {"ours": ours, "transformers": theirs}


LAYERS = {"mamba2": _mamba2, "gated_delta_net": _gated_delta_net, "mamba": _mamba}
CORES = {"mamba2": _ssd, "gated_delta_net": _delta}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row: what was timed, tokens per second of both, how many times as fast."""
    columns = (
        ("tokens", 7),
        ("width", 7),
        ("heads", 10),
        ("kv", 5),
        ("ours tok/s", 12),
        ("theirs", 10),
        ("x", 8),
        ("x cpu", 8),
        ("most", 8),
    )
    lines = [f"{'mixer':<16}{'part':<7}" + "".join(f"{name:>{width}}" for name, width in columns)]
    for row in rows:
        most = "" if row["most"] is None else f"{row['most']:.2f}"
        speed, heads = row["tokens_per_second"], f"{row['heads']}x{row['dim']}"
        lines.append(
            f"{row['mixer']:<16}{row['part']:<7}{row['tokens']:>7}{row['width']:>7}{heads:>10}{row['kv_heads']:>5}{speed['ours']:>12.0f}"
            f"{speed['transformers']:>10.0f}{row['speedup']:>8.2f}{row['speedup_cpu']:>8.2f}{most:>8}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print a table or (`--json`, `--out`) all of it."""
    options = parser(__doc__)
    options.add_argument("--mixers", nargs="+", default=list(LAYERS), help=f"of {', '.join(LAYERS)}")
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--mamba-tokens", type=int, default=512, help="tokens for mamba (theirs is quadratic in them)")
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--kv-heads", type=int, nargs="+", help="of ours, one run each (default: as --heads)")
    options.add_argument("--dim", type=int, default=64)
    options.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    rows = []
    for name in chosen.mixers:
        tokens = chosen.mamba_tokens if name == "mamba" else chosen.tokens
        for kv_heads in chosen.kv_heads or [chosen.heads]:
            size = Size(tokens=tokens, width=chosen.width, heads=chosen.heads, kv_heads=kv_heads, dim=chosen.dim)
            rows += measure(name, size, 1 if name == "mamba" else chosen.repeats)
    if not chosen.json:
        print(table(rows))
    if chosen.json or chosen.out is not None:
        setting = {"batch": 1, "dtype": "float32", "threads": chosen.threads}
        publish(
            "3 times transformers' tokens/s (mamba2, gated_delta_net); 100 times (mamba)", setting, rows, chosen.out
        )


if __name__ == "__main__":
    main()
