"""What the recurrent operations share before and after a backend: rules, dtypes, `commit`, queries of the last tokens.

Their backends have one order of preference: one launch for a few CUDA tokens, the recurrence itself for one token,
pairs of tokens for a few, a library's kernel or chunks for many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Required, TypedDict

import torch
from torch import Tensor

from linearize.ops import triton as kernels
from linearize.ops.dispatch import MAX_MULTI_TOKEN, Call, Dispatcher, Rule, always, more_than, wants_gradients
from linearize.ops.layout import Layout

FLA = Rule(
    "fla",
    kernels.fla_why_not_chosen,
    "many tokens on a GPU: fla's chunks",
    built=True,
    unsupported=kernels.fla_unsupported,
)
Backend = Callable[..., tuple[Tensor, Tensor | None]]
MULTI_STEP = {"reference", "multi_token", "triton"}  # backends that know `commit` and fewer queries than tokens


class StepOptions(TypedDict, total=False):
    """Keywords of every backend in `MULTI_STEP`; the others take no `commit`."""

    layout: Required[Layout]
    state: Tensor | None
    commit: int | None


class RecurrenceOptions(TypedDict, total=False):
    """Keywords of every recurrent operation; see `run_recurrence`."""

    layout: Required[Layout]
    state: Tensor | None
    need_state: bool
    commit: int | None


def recurrent_rules(library: Rule, chunked: str) -> list[Rule]:
    """The rules of a recurrence; `library`: a kernel of another package; `chunked`: what its chunks are good for."""
    return [
        Rule(
            "triton",
            kernels.why_not_chosen,
            "a few tokens on a GPU: one launch",
            built=True,
            unsupported=kernels.unsupported,
        ),
        Rule("reference", more_than(1), "one token: the recurrence itself"),
        Rule("multi_token", more_than(MAX_MULTI_TOKEN), "a few tokens: the state read once"),
        library,
        Rule("chunked", always, chunked),
    ]


def run_recurrence(
    dispatcher: Dispatcher,
    invoke: Backend,
    queries: Tensor,
    inputs: tuple[Tensor, ...],
    *,
    call: Call,
    layout: Layout,
    state: Tensor | None,
    need_state: bool,
    commit: int | None,
    time_dim: int = 2,
    widening: Collection[str] = (),
) -> tuple[Tensor, Tensor | None]:
    """y of the tokens that have a query (the last ones), and the state after `commit` tokens (None: after all; no state
    unless `need_state`).

    `invoke(backend, queries, *inputs, layout=, state=)` runs a backend, one of `MULTI_STEP` with `commit` too. Inputs
    and state are given in `call.dtype`, to backends of `widening` as they are.
    """

    def run(name: str) -> tuple[Tensor, Tensor | None]:
        cast = (queries, *inputs) if name in widening else tuple(x.to(call.dtype) for x in (queries, *inputs))
        before = None if state is None else state.to(call.dtype)
        if name in MULTI_STEP:
            return invoke(name, *cast, layout=layout, state=before, commit=commit if need_state else 0)
        if commit is None and queries.shape[time_dim] == inputs[0].shape[time_dim]:
            return invoke(name, *cast, layout=layout, state=before)
        return _in_parts(name, invoke, cast[0], cast[1:], time_dim=time_dim, layout=layout, state=before, commit=commit)

    with torch.autocast(call.device, enabled=False):
        y, after = dispatcher.run(call, run)
    return y, after if need_state else None


WIDENING = {"chunked", "fla"}  # backends of linear recurrences that take half precision and compute in fp32 themselves


def recurrent_call(q_BHUK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, *others: Tensor | None, layout: Layout) -> Call:
    """The call that the rules of a linear recurrence see; `others`: decays, write strengths, the state."""
    return Call(
        device=v_BHTV.device.type,
        dtype=torch.promote_types(v_BHTV.dtype, torch.float32),
        tokens=k_BHTK.shape[2],
        layout=layout,
        gradients=wants_gradients(q_BHUK, k_BHTK, v_BHTV, *others),
    )


def run_linear_recurrence(
    dispatcher: Dispatcher,
    backends: Mapping[str, Backend],
    *inputs: Tensor,
    layout: Layout,
    state: Tensor | None,
    need_state: bool,
    commit: int | None,
) -> tuple[Tensor, Tensor | None]:
    """`decay_linear` or `gated_delta` of `inputs` (q, k, v, then decays and write strengths) by the backend chosen.

    Returns y in the dtype of v, and the state as `run_recurrence` does.
    """
    y, after = run_recurrence(
        dispatcher,
        lambda name, *tensors, **options: backends[name](*tensors, **options),
        inputs[0],
        inputs[1:],
        call=recurrent_call(*inputs, state, layout=layout),
        layout=layout,
        state=state,
        need_state=need_state,
        commit=commit,
        widening=WIDENING,
    )
    return y.to(inputs[2].dtype), after


def _in_parts(
    name: str,
    invoke: Backend,
    queries: Tensor,
    inputs: tuple[Tensor, ...],
    *,
    time_dim: int,
    layout: Layout,
    state: Tensor | None,
    commit: int | None,
) -> tuple[Tensor, Tensor | None]:
    """A backend that knows no `commit` and wants a query for every token: the committed tokens by themselves first.

    Tokens that have no query are given zeros for one, and their outputs are left out.
    """
    tokens, num_queries = inputs[0].shape[time_dim], queries.shape[time_dim]
    missing = list(queries.shape)
    missing[time_dim] = tokens - num_queries
    queries = torch.cat([queries.new_zeros(missing), queries], dim=time_dim)
    if commit is None or commit == 0:
        y, after = invoke(name, queries, *inputs, layout=layout, state=state)
        return y.narrow(time_dim, tokens - num_queries, num_queries), after if commit is None else state
    ys, after = [], state
    committed = state
    for start, stop in ((0, commit), (commit, tokens)):
        if stop > start:
            part = [x.narrow(time_dim, start, stop - start) for x in (queries, *inputs)]
            y, after = invoke(name, *part, layout=layout.part(start, stop), state=after)
            ys.append(y)
        committed = after if stop == commit else committed
    return torch.cat(ys, dim=time_dim).narrow(time_dim, tokens - num_queries, num_queries), committed
