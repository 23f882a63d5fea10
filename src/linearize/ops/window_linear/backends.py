"""Which form of window + linear attention runs a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from linearize.ops import triton as kernels
from linearize.ops.forms import Call, Dispatcher, Rule, never
from linearize.ops.layout import Layout
from linearize.ops.window_linear.few import FEW_TOKENS
from linearize.ops.window_linear.maps import weights_of
from linearize.ops.window_linear.spec import WindowLinear
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.window import MOST_CHUNK, chunk_of

MOST_HEAD_DIM = 128
Cursor = Literal["none", "same", "rows"]


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowCall(Call):
    """A call of the operation: what it computes, and the state before it (`cursor`: none, at the same position in
    every row, or at one for each). `in_place`: the state is buffers that are written. `widest`: its largest head
    dimension."""

    spec: WindowLinear
    in_place: bool = False
    cursor: Cursor = "none"
    widest: int = 0


def cursor_of(state: WindowLinearState | None, layout: Layout) -> Cursor:
    """What a rule looks at of a state; one that the tokens do not follow stands nowhere in particular."""
    if state is None:
        return "none"
    follows = not isinstance(state.next, Tensor) and (state.next == layout.start or not layout.is_plain)
    return "same" if follows else "rows"


def kernel_refuses(call: WindowCall) -> str | None:
    """Why the multi-step kernel does not run a call; None: it does."""
    if (reason := kernels.refuses(call)) is not None:
        return reason
    maps = (call.spec.feature_q, call.spec.feature_k)
    unknown = any(m is not None and weights_of(m) is None for m in maps)
    return "a feature map that the kernel does not know" if unknown else None


def chunks_refuse(call: WindowCall) -> str | None:
    """Why the kernels over chunks do not run a call; None: they do."""
    if not call.whole or call.layout.gaps():
        return "tokens without an output, or dead ones between others"
    if (reason := kernels.base_refuses(call)) is not None:
        return reason
    if chunk_of(call.spec.window, call.spec.shape) > MOST_CHUNK:
        return f"a window whose reach is more than {MOST_CHUNK} tokens"
    if call.widest > MOST_HEAD_DIM:
        return f"heads of more than {MOST_HEAD_DIM}"
    return None


def _in_place_refuses(call: WindowCall) -> str | None:
    return None if call.in_place else "the state is no buffers of a static cache"


def _step_refuses(call: WindowCall) -> str | None:
    one = call.whole and call.tokens == 1 and call.layout.is_plain and call.cursor == "same"
    return None if one else "not one token after the same state in every row"


def _few_refuses(call: WindowCall) -> str | None:
    plain = call.layout.is_plain and call.cursor == "same" and call.spec.has_window
    return None if plain and 0 < call.tokens <= FEW_TOKENS else "not a few tokens after the same state in every row"


def _reference_refuses(call: WindowCall) -> str | None:
    few = call.tokens <= FEW_TOKENS or not call.whole or call.layout.gaps()
    return None if few else f"more than {FEW_TOKENS} tokens"


DISPATCH = Dispatcher(
    "window_linear",
    [
        Rule("triton", kernel_refuses, "a few tokens on a GPU: one launch", built=True),
        Rule("in_place", _in_place_refuses, "a static cache: ring and sum written where they are"),
        Rule("step", _step_refuses, "one token: nothing is masked"),
        Rule("few", _few_refuses, "a few tokens: past and new keys side by side"),
        Rule("reference", _reference_refuses, "a few tokens, or dead ones among them"),
        Rule("triton_chunks", chunks_refuse, "many tokens on a GPU: window and sum in one pass", built=True),
        Rule("chunked", never, "many tokens: products of chunks"),
    ],
)


def choice(call: WindowCall) -> tuple[str, str]:
    """The form for a call and why."""
    return DISPATCH.choice(call)
