"""A few tokens at once, without chunks: every output from the state before them, for the verification of draft tokens.

The state is read once and the one after `commit` tokens written once, however many tokens there are. With
G_i = g_1 + ... + g_i, `decay_linear` is

    y_i = exp(G_i) q_i S + sum_{j <= i} (q_i . exp(G_i - G_j) k_j) v_j
    S_n = exp(G_n) S + sum_{j <= n} exp(G_n - G_j) k_j v_j^T

and `gated_delta`, where token i writes delta_i along k_i (see `gated_delta/chunked.py`),

    (1 + A) delta = beta (v - carried k S),  A_ij = beta_i pair_ij k_i . k_j  for j < i
    y_i = carried_i q_i S + sum_{j <= i} pair_ij (q_i . k_j) delta_j
    S_n = kept S + sum_{j <= n} written_j k_j delta_j^T

`selective_scan` takes decays and inputs of all tokens at once, then one multiply-add per token.

Letters: B batch, H heads, T tokens, U of them (the last) with an output, K key dimension, V value dimension. The
scan: E channels = G groups x P channels, N state size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.matmul import UNDERFLOW

LOWEST = -1000.0  # exp of less is 0 in fp64 too; sums of such log decays stay exact


@dataclass(frozen=True, eq=False)
class Pairs:
    """Masks of T tokens; a size of 1 stands for all rows.

    `seen_BTT`: token i sees token j <= i. `live_BT`: alive (None: all are). `document_BT`: how many documents have
    opened since the call began; 0 is that of the state (None: none has).
    """

    seen_BTT: Tensor
    live_BT: Tensor | None
    document_BT: Tensor | None


def pairs(layout: Layout, num_tokens: int, device: torch.device) -> Pairs:
    """The masks; computed once for all layers that share a layout."""
    key = ("pairs", num_tokens)
    if key not in layout.memo:
        seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()[None]
        starts = layout.starts(num_tokens, device)
        document = None if starts is None else starts.long().cumsum(-1)
        if document is not None:
            seen = seen & (document[:, :, None] == document[:, None])
        layout.memo[key] = Pairs(seen, layout.live(), document)
    masks: Pairs = layout.memo[key]
    return masks


def decay_factor(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """exp of an exponent that is at most 0 where it counts."""
    return exponent.clamp(min=UNDERFLOW, max=0).to(dtype).exp()


def column(x: Tensor) -> Tensor:
    """`[B, H, T]` as `[B, H, T, 1]`; with a dimension per key as it is."""
    return x[..., None] if x.dim() == 3 else x


def like_decays(mask_BT: Tensor, log_decay: Tensor) -> Tensor:
    """A mask of tokens for log decays `[B, H, T]` or `[B, H, T, K]`."""
    return mask_BT[:, None] if log_decay.dim() == 3 else mask_BT[:, None, :, None]


def state_after(k: Tensor, written: Tensor, total: Tensor, where: Pairs, state: Tensor | None, commit: int) -> Tensor:
    """The state after the first `commit` tokens, of which token j writes `written[j]` along `k[j]`; `total`: summed log
    decays."""
    total = total[:, :, :commit]
    last = total[:, :, -1:]
    leave, through = column(decay_factor(last - total, k.dtype)), column(decay_factor(last, k.dtype)).mT
    if where.document_BT is not None:
        document = where.document_BT[:, None, :commit, None]
        leave, through = leave * (document == document[:, :, -1:]), through * (document[:, :, -1:] == 0)
    added = (k[:, :, :commit] * leave).mT @ written[:, :, :commit]
    return added if state is None else torch.addcmul(added, through, state)


def decay_linear(
    q_BHUK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments, outputs and values as `reference`; the state is None where `commit` is 0 and there was none."""
    tokens, outputs = k_BHTK.shape[2], q_BHUK.shape[2]
    where = pairs(layout, tokens, k_BHTK.device)
    if where.live_BT is not None:
        k_BHTK = k_BHTK * where.live_BT[:, None, :, None]
        log_decay = log_decay.masked_fill(~like_decays(where.live_BT, log_decay), 0)
    total = log_decay.clamp(min=LOWEST).cumsum(2, dtype=torch.float64)
    after = (
        state if commit == 0 else state_after(k_BHTK, v_BHTV, total, where, state, tokens if commit is None else commit)
    )
    if outputs == 0:
        return v_BHTV[:, :, :0], after
    late = total[:, :, tokens - outputs :]
    y = _scores(q_BHUK, k_BHTK, late, total, where) @ v_BHTV
    if state is not None:
        enter = column(decay_factor(late, q_BHUK.dtype))
        if where.document_BT is not None:
            enter = enter * (where.document_BT[:, None, tokens - outputs :, None] == 0)
        y = y + (q_BHUK * enter) @ state
    return y, after


def _scores(q: Tensor, k: Tensor, late: Tensor, total: Tensor, where: Pairs) -> Tensor:
    """q_i . exp(G_i - G_j) k_j for j <= i of one document, else 0: `[B, H, U, T]`."""
    seen = where.seen_BTT[:, None, -q.shape[2] :]
    if total.dim() == 3:
        return (q @ k.mT) * decay_factor(late[..., None] - total[:, :, None], q.dtype).masked_fill(~seen, 0)
    between = decay_factor(late[:, :, :, None] - total[:, :, None], q.dtype)
    return torch.einsum("bhuk,bhutk,bhtk->bhut", q, between, k).masked_fill(~seen, 0)


def gated_delta(
    q_BHUK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments, outputs and values as `reference`; the state is None where `commit` is 0 and there was none."""
    tokens, outputs = k_BHTK.shape[2], q_BHUK.shape[2]
    where, first = pairs(layout, tokens, k_BHTK.device), tokens - outputs
    log_decay = log_decay_BHT.clamp(min=LOWEST)
    if where.live_BT is not None:
        log_decay, beta_BHT = (x.masked_fill(~where.live_BT[:, None], 0) for x in (log_decay, beta_BHT))
    total, beta = log_decay.cumsum(2, dtype=torch.float64), beta_BHT[..., None]
    both = torch.cat([k_BHTK, q_BHUK], dim=2)
    pair = decay_factor(total[..., :, None] - total[..., None, :], k_BHTK.dtype) * where.seen_BTT[:, None]
    scores = both @ k_BHTK.mT
    written = beta * v_BHTV
    recalled = None
    if state is not None:
        carried = decay_factor(total, k_BHTK.dtype)
        if where.document_BT is not None:
            carried = carried * (where.document_BT[:, None] == 0)
        recalled = both @ state * torch.cat([carried, carried[:, :, first:]], dim=2)[..., None]
        written = written - beta * recalled[:, :, :tokens]
    system = scores[:, :, :tokens] * pair * beta
    delta = torch.linalg.solve_triangular(system, written, upper=False, unitriangular=True)
    after = (
        state if commit == 0 else state_after(k_BHTK, delta, total, where, state, tokens if commit is None else commit)
    )
    y = (scores[:, :, tokens:] * pair[:, :, first:]) @ delta
    return y if recalled is None else y + recalled[:, :, tokens:], after


def selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTGN: Tensor,
    C_BUGN: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments, outputs and values as `reference.selective_scan`."""
    tokens, groups = x_BTE.shape[1], B_BTGN.shape[2]
    first = tokens - C_BUGN.shape[1]
    decay_BTGPN = (dt_BTE[..., None] * A_EN).exp().unflatten(2, (groups, -1))
    if (opens_BT := layout.starts(tokens, x_BTE.device)) is not None:
        decay_BTGPN = decay_BTGPN.masked_fill(opens_BT[:, :, None, None, None], 0)
    u_BTGP = (dt_BTE * x_BTE).unflatten(2, (groups, -1))
    h_BGPN = None if state is None else state.unflatten(1, (groups, -1))
    added = (u_BTGP[..., None] * B_BTGN[..., None, :]).unbind(1)
    committed, y = h_BGPN, []
    for t, (decay, written) in enumerate(zip(decay_BTGPN.unbind(1), added, strict=True)):
        h_BGPN = written if h_BGPN is None else torch.addcmul(written, decay, h_BGPN)
        if t + 1 == commit:
            committed = h_BGPN
        if t >= first:
            y.append((h_BGPN @ C_BUGN[:, t - first, :, :, None]).squeeze(-1))
    after = h_BGPN if commit is None else committed
    y_BUE = torch.stack(y, dim=1).flatten(2) if y else x_BTE[:, :0]
    return y_BUE, after.flatten(1, 2) if need_state and after is not None else None
