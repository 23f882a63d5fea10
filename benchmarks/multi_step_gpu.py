"""The multi-step kernels on a GPU, against the PyTorch road through the same mixer and against one token at a time.

For each mixer, from one state: advance over `--tail` accepted tokens and give the outputs of K new ones, between the
projections. `kernel`: one launch. `unfused`: the same by the operations of the mixer, each in PyTorch. `single`: K
launches of one token each; `in_place`: the same with ring and state written where they are (window mixers: decode).
`projections`: what they cost besides.

With `--interpret` the kernels run on CPU tensors in Triton's interpreter, at a small size: everything is run, and the
times mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.on_gpu import arguments, device_for
from benchmarks.timing import SEED, parser, publish_each
from linearize.errors import one_line
from linearize.evaluation.speed.running import interleaved
from linearize.mixers import MIXERS, AttentionShape
from linearize.ops.layout import Layout
from linearize.ops.recurrent.layer_steps import use_backend as use_layer_backend
from linearize.ops.window_linear import use_backend as use_window_backend

LAYER_MIXERS = ("mamba2", "gated_delta_net", "mamba")
WINDOW_MIXERS = ("lolcats", "sliding_window")
PAST = 300  # tokens read before: more than any window here holds
INNER = 20  # runs between two readings of the clock: one is too short for it
SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 4, "tail": 1, "tokens": [1, 2], "repeats": 1, "window": 2}
Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows, tokens before, accepted tokens, new tokens."""

    batch: int
    past: int
    tail: int
    new: int


def layer_runs(mixer: Any, sizes: Sizes, device: torch.device) -> dict[str, Run]:
    """What to time of a layer mixer."""
    tail, tokens = sizes.tail, sizes.tail + sizes.new
    weight = mixer.out_proj.weight
    hidden = torch.randn(sizes.batch, sizes.past + tokens, mixer.shape.model_dim, device=device, dtype=weight.dtype)
    _, state = mixer(hidden[:, : sizes.past], layout=Layout())
    hidden, raw = hidden[:, sizes.past :], mixer.project(hidden[:, sizes.past :])
    layout = Layout(start=sizes.past)
    options: dict[str, Any] = {"layout": layout, "state": state, "commit": tail, "outputs": sizes.new}
    options["need_state"] = True

    def single() -> None:
        after = mixer.advance(*(x[:, :tail] for x in raw), layout=layout, state=state) if tail else state
        for t in range(tail, tokens):
            one, at = [x[:, t : t + 1] for x in raw], Layout(start=sizes.past + t)
            _, after = mixer.by_kernel(*one, layout=at, state=after, need_state=True, commit=1, outputs=1)

    def unfused() -> Any:
        return mixer.by_operations(*raw, **options)

    return {
        "kernel": lambda: mixer.by_kernel(*raw, **options),
        "single": single,
        "unfused": _forced("operations", unfused),
        "projections": lambda: mixer.project(hidden),
    }


def window_runs(mixer: Any, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """What to time of a window mixer; k and v are given, so that there are no projections."""
    from linearize.ops.triton.window import window_linear_steps
    from linearize.ops.window_linear.state import WindowBuffers

    shape, tail, tokens = mixer.shape, sizes.tail, sizes.tail + sizes.new
    widths = ((shape.num_heads, shape.head_dim), (shape.num_kv_heads, shape.head_dim))
    many = [
        torch.randn(sizes.batch, heads, sizes.past + tokens, dim, device=device, dtype=dtype)
        for heads, dim in (*widths, (shape.num_kv_heads, shape.value_dim))
    ]
    scaling = shape.head_dim**-0.5
    _, state = mixer(*(x[:, :, : sizes.past] for x in many), scaling=scaling, layout=Layout())
    q, k, v = (x[:, :, sizes.past :] for x in many)
    spec = mixer.spec(scaling=scaling, softcap=None, branch="both")
    buffers = WindowBuffers.of(state, spec, most=1)
    layout, options = Layout(start=sizes.past), {"scaling": scaling, "state": state, "commit": tail}

    def call() -> Any:
        return mixer(q[:, :, tail:], k, v, layout=layout, **options)

    def one_by_one(held: Any) -> None:
        for t in range(tokens):
            one = [x[:, :, t : t + 1] for x in (q, k, v)]
            _, held = window_linear_steps(*one, spec=spec, layout=Layout(start=sizes.past + t), state=held)

    return {
        "kernel": _forced("triton", call),
        "single": lambda: one_by_one(state),
        "in_place": lambda: one_by_one(buffers),
        "unfused": _forced("reference", call),
    }


def _forced(form: str, run: Run) -> Run:
    def forced() -> Any:
        force = use_layer_backend if form == "operations" else use_window_backend
        with force(form):
            return run()

    return forced


def _repeated(run: Run, times: int) -> Run:
    def many() -> None:
        for _ in range(times):
            run()

    return many


def _graphed(run: Run) -> Run:
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
def measure(options: Any, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """One row per mixer and K: microseconds of each, and the ratios; or why there are none."""
    shape = AttentionShape(
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        value_dim=options.head_dim,
        model_dim=options.heads * options.head_dim,
    )
    inner = 1 if options.interpret else INNER
    for name in options.mixers:
        torch.manual_seed(SEED)
        config = {"window": options.window} if name in WINDOW_MIXERS else {}
        mixer: Any = MIXERS[name](**config).build(shape).to(device, dtype).requires_grad_(False)
        for new in options.tokens:
            past = 5 * options.window if options.interpret else PAST
            sizes = Sizes(batch=options.batch, past=past, tail=options.tail, new=new)
            made = window_runs(mixer, sizes, device, dtype) if config else layer_runs(mixer, sizes, device)
            row = {"mixer": name, "new_tokens": new}
            try:
                runs = {key: _repeated(_graphed(run) if options.graphs else run, inner) for key, run in made.items()}
                times = interleaved(runs, options.repeats, warmup=0 if options.interpret else 3)
            except RuntimeError as error:
                yield row | {"reason": one_line(error)}
                continue
            micro = {key: 1e6 * timing.lowest / inner for key, timing in times.items()}
            ratios = {f"speedup_over_{key}": micro[key] / micro["kernel"] for key in ("unfused", "single")}
            yield row | {"microseconds": micro, **ratios}


def main(argv: Sequence[str] | None = None) -> None:
    """Run and publish; says so in one line where there is no GPU."""
    options = parser(__doc__)
    names = [*LAYER_MIXERS, *WINDOW_MIXERS]
    options.add_argument("--mixers", nargs="+", choices=names, default=names)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--kv-heads", type=int, default=8)
    options.add_argument("--head-dim", type=int, default=128)
    options.add_argument("--window", type=int, default=64, help="of the window mixers")
    options.add_argument("--tail", type=int, default=4, help="accepted tokens that the state has not seen")
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8], help="K, new tokens")
    options.add_argument("--graphs", action="store_true", help="time CUDA graphs, without Python's share")
    chosen = arguments(options, argv, SMALL)
    device = device_for(chosen, "benchmarks.multi_step_gpu", argv)
    if device is None:
        return
    dtype = torch.float32 if chosen.interpret else torch.bfloat16
    setting = {key: value for key, value in vars(chosen).items() if key != "out"}
    setting |= {"dtype": str(dtype), "gpu": None if chosen.interpret else torch.cuda.get_device_name(device)}
    asked = "the fused kernel is faster than the unfused road and than K single steps"
    publish_each(asked, setting, measure(chosen, device, dtype), chosen.out)


if __name__ == "__main__":
    main()
