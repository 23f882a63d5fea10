"""The multi-step kernels on a GPU, against the PyTorch road through the same mixer and against one token at a time.

For each mixer, from one state: advance over `--tail` accepted tokens and give the outputs of K new ones. `kernel`: one
launch between the projections. `unfused`: the same by the mixer's PyTorch operations, as two calls (tail, then new
tokens). `single`: K launches of one token each. Projections are left out of `kernel` and `single`; `unfused` has them,
and `projections` tells what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linearize.benchmarks.timing import SEED, parser, publish
from linearize.evaluation.speed.timing import interleaved
from linearize.mixers import MIXERS, AttentionShape
from linearize.ops.layout import Layout
from linearize.ops.triton import has_triton

MIXER_NAMES = ("mamba2", "gated_delta_net", "mamba")
INNER = 20  # runs between two readings of the clock: one is too short for it


def kernel_of(mixer: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A mixer's kernel with the mixer's parameters: takes raw inputs, `memory`, `taps_BPC` and the rest by keyword."""
    from linearize.ops.triton.fused_heads import HeadSizes, gated_delta_net_steps, mamba2_steps
    from linearize.ops.triton.mamba import ChannelSizes, mamba_steps

    shape, repeat = mixer.shape, mixer.config.repeat
    heads = {"heads": shape.num_heads, "groups": shape.num_kv_heads, "repeat": repeat}
    given: dict[str, Any] = {"conv_weight_CW": mixer.conv_weight}
    if mixer.config.name == "mamba":
        sizes = ChannelSizes(head_dim=shape.head_dim, state_dim=mixer.state_dim, **heads)
        given |= {"conv_bias_C": mixer.conv_bias, "dt_bias_E": mixer.dt_bias, "A_log_EN": mixer.A_log, "D_E": mixer.D}
        return partial(mamba_steps, sizes=sizes, **given)
    given |= {"sizes": HeadSizes(key_dim=shape.head_dim, value_dim=shape.value_dim, **heads), "eps": shape.norm_eps}
    given |= {"dt_bias_H": mixer.dt_bias, "A_log_H": mixer.A_log}
    if mixer.config.name == "mamba2":
        given |= {"conv_bias_C": mixer.conv_bias, "D_H": mixer.D, "norm_weight": mixer.norm_weight}
        return partial(mamba2_steps, **given)
    return partial(gated_delta_net_steps, norm_weight_V=mixer.norm_weight, **given)


def project(mixer: Any, hidden_BTM: Tensor) -> tuple[Tensor, ...]:
    """What the kernel takes."""
    if mixer.config.name == "mamba":
        return mixer.in_proj(hidden_BTM), mixer.dt_proj(mixer.dt_in(hidden_BTM))
    if mixer.config.name == "mamba2":
        return (mixer.in_proj(hidden_BTM),)
    return tuple(m(hidden_BTM) for m in (mixer.qkv_proj, mixer.decay_proj, mixer.beta_proj, mixer.gate_proj))


def runs_of(mixer: Any, batch: int, tail: int, new: int, device: torch.device, graphs: bool) -> dict[str, Any]:
    """The things to time, each `INNER` times over."""
    weight = mixer.out_proj.weight
    hidden = torch.randn(batch, tail + new, mixer.shape.model_dim, device=device, dtype=weight.dtype)
    kernel, raw = kernel_of(mixer), project(mixer, hidden)
    _, state = mixer(hidden, layout=Layout())
    held = {"memory": state.memory, "taps_BPC": state.taps}
    layout = Layout(start=tail + new)

    def fused() -> Any:
        return kernel(*raw, layout=layout, commit=tail, outputs=new, memory_out=state.memory.clone(), **held)

    def single() -> None:
        memory, taps = state.memory.clone(), state.taps
        for t in range(new):
            one = [x[:, t : t + 1] for x in raw]
            _, memory, taps = kernel(*one, layout=layout, memory=memory, taps_BPC=taps, memory_out=memory)

    def unfused() -> Any:
        after = mixer(hidden[:, :tail], layout=layout, state=state)[1] if tail else state
        return mixer(hidden[:, tail:], layout=Layout(start=tail), state=after, need_state=False)

    found = {"kernel": fused, "single": single, "unfused": unfused, "projections": lambda: project(mixer, hidden)}
    return {name: _repeated(_graphed(run) if graphs else run) for name, run in found.items()}


def _repeated(run: Callable[[], Any]) -> Callable[[], None]:
    def many() -> None:
        for _ in range(INNER):
            run()

    return many


def _graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run as a CUDA graph, so that launches cost what they cost in a captured decoding loop."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@torch.no_grad()
def measure(options: Any, device: torch.device) -> list[dict[str, Any]]:
    """One row per mixer and K: microseconds of each, and the ratios."""
    shape = AttentionShape(
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        value_dim=options.head_dim,
        model_dim=options.heads * options.head_dim,
    )
    rows = []
    for name in MIXER_NAMES:
        torch.manual_seed(SEED)
        mixer: Any = MIXERS[name]().build(shape).to(device, torch.bfloat16).requires_grad_(False)
        for new in options.tokens:
            runs = runs_of(mixer, options.batch, options.tail, new, device, options.graphs)
            times = interleaved(runs, options.repeats, warmup=3)
            micro = {key: 1e6 * timing.lowest / INNER for key, timing in times.items()}
            rows.append(
                {
                    "mixer": name,
                    "new_tokens": new,
                    "microseconds": micro,
                    "speedup_over_unfused": micro["unfused"] / (micro["kernel"] + micro["projections"]),
                    "speedup_over_single": micro["single"] / micro["kernel"],
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish; says so in one line where there is no GPU."""
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--kv-heads", type=int, default=8)
    options.add_argument("--head-dim", type=int, default=128)
    options.add_argument("--tail", type=int, default=4, help="accepted tokens that the state has not seen")
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8], help="K, new tokens")
    options.add_argument("--graphs", action="store_true", help="time CUDA graphs, without Python's share")
    chosen = options.parse_args(arguments)
    if not torch.cuda.is_available() or not has_triton():
        print("needs a GPU and triton: nothing was measured")
        return
    device = torch.device("cuda")
    rows = measure(chosen, device)
    setting = {key: value for key, value in vars(chosen).items() if key != "out"}
    setting |= {"dtype": "bfloat16", "gpu": torch.cuda.get_device_name(device)}
    publish("the fused kernel is faster than the unfused road and than K single steps", setting, rows, chosen.out)


if __name__ == "__main__":
    main()
