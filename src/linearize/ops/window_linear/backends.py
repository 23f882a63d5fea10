"""Which backend of window + linear attention runs a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from linearize.ops import triton as kernels
from linearize.ops.dispatch import MAX_MULTI_TOKEN, Call, Dispatcher, Rule, always
from linearize.ops.layout import Layout
from linearize.ops.window_linear.spec import MOST_CHUNK, WindowLinear, chunk_of, weights_of
from linearize.ops.window_linear.state import WindowLinearState

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


def kernel_why_not_chosen(call: WindowCall) -> str | None:
    """Why the multi-step kernel does not run a call; None: it does."""
    return kernels.why_not_chosen(call) or _unknown_map(call)


def kernel_unsupported(call: WindowCall) -> str | None:
    """Why a call is beyond the multi-step kernel."""
    return kernels.unsupported(call) or _unknown_map(call)


def _unknown_map(call: WindowCall) -> str | None:
    maps = (call.spec.feature_q, call.spec.feature_k)
    unknown = any(m is not None and weights_of(m) is None for m in maps)
    if call.spec.store:
        return "an exact store, which has no kernel yet"
    return "a feature map that the kernel does not know" if unknown else None


def chunks_why_not_chosen(call: WindowCall) -> str | None:
    """Why the kernels over chunks do not run a call; None: they do."""
    if not call.whole or call.layout.gaps():
        return "tokens without an output, or dead ones between others"
    return kernels.base_why_not_chosen(call) or _too_large(call)


def chunks_unsupported(call: WindowCall) -> str | None:
    """Why a call is beyond the kernels over chunks."""
    if not call.whole:  # then another backend runs, whichever is forced
        return None
    return "dead tokens between others" if call.layout.gaps() else kernels.base_unsupported(call) or _too_large(call)


def _too_large(call: WindowCall) -> str | None:
    if call.spec.store:
        return "an exact store, which has no kernel yet"
    if chunk_of(call.spec.window, call.spec.shape) > MOST_CHUNK:
        return f"a window whose reach is more than {MOST_CHUNK} tokens"
    if call.widest > MOST_HEAD_DIM:
        return f"heads of more than {MOST_HEAD_DIM}"
    return None


def _in_place_why_not_chosen(call: WindowCall) -> str | None:
    return None if call.in_place else "the state is no buffers of a static cache"


def _step_why_not_chosen(call: WindowCall) -> str | None:
    one = call.whole and call.tokens == 1 and call.layout.is_plain and call.cursor == "same"
    return None if one else "not one token after the same state in every row"


def _store_why_not_chosen(call: WindowCall) -> str | None:
    return None if call.spec.store and not call.in_place else "no exact store"


def _multi_token_why_not_chosen(call: WindowCall) -> str | None:
    plain = call.layout.is_plain and call.cursor == "same" and call.spec.has_window
    return (
        None if plain and 0 < call.tokens <= MAX_MULTI_TOKEN else "not a few tokens after the same state in every row"
    )


def _step_unsupported(call: WindowCall) -> str | None:
    return _step_why_not_chosen(call) if call.whole and not call.in_place else None


def _multi_token_unsupported(call: WindowCall) -> str | None:
    plain = call.layout.is_plain and call.cursor == "same" and call.spec.has_window
    can = plain or call.in_place or not call.spec.has_linear
    return None if can else "not tokens after the same state in every row, within a window"


def _reference_why_not_chosen(call: WindowCall) -> str | None:
    short = call.tokens <= MAX_MULTI_TOKEN or not call.whole or call.layout.gaps()
    return None if short else f"more than {MAX_MULTI_TOKEN} tokens"


DISPATCH = Dispatcher(
    "window_linear",
    [
        Rule(
            "triton",
            kernel_why_not_chosen,
            "a few tokens on a GPU: one launch",
            built=True,
            unsupported=kernel_unsupported,
        ),
        Rule(
            "in_place",
            _in_place_why_not_chosen,
            "a static cache: ring and sum written where they are",
            unsupported=_in_place_why_not_chosen,
        ),
        Rule("step", _step_why_not_chosen, "one token: nothing is masked", unsupported=_step_unsupported),
        Rule(
            "store",
            _store_why_not_chosen,
            "an exact store: block after block",
            unsupported=_store_why_not_chosen,
        ),
        Rule(
            "multi_token",
            _multi_token_why_not_chosen,
            "a few tokens: past and new keys side by side",
            unsupported=_multi_token_unsupported,
        ),
        Rule("reference", _reference_why_not_chosen, "a few tokens, or dead ones among them"),
        Rule(
            "triton_chunks",
            chunks_why_not_chosen,
            "many tokens on a GPU: window and sum in one pass",
            built=True,
            unsupported=chunks_unsupported,
        ),
        Rule("chunked", always, "many tokens: products of chunks"),
    ],
)


def choice(call: WindowCall) -> tuple[str, str]:
    """The backend for a call and why."""
    return DISPATCH.choice(call)
