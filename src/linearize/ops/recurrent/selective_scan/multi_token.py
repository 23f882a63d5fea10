"""A few tokens of the selective scan: decays and inputs of all at once, then one multiply-add per token.

Letters: B batch, T tokens, U of them (the last) with an output, E channels = G groups x P channels, N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.layout import Layout


def multi_token(
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
    """Same arguments, outputs and values as `reference`."""
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
