"""What stands in the place of an attention module: a mixer with its own projections, called as the module was."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from linearize.errors import InputError
from linearize.modeling.attention import MixerCall, refuse_unread, require_call, through_cache
from linearize.modeling.cache import Pending

if TYPE_CHECKING:
    from linearize.mixers import LayerMixer


class MixerLayer(nn.Module):
    """A layer mixer in transformers' calling convention for attention modules.

    `arguments`: what the forward of the module in whose place it is takes by name.
    """

    def __init__(self, mixer: LayerMixer, layer_idx: int, arguments: Collection[str]) -> None:
        super().__init__()
        self.mixer, self.layer_idx, self.arguments = mixer, layer_idx, frozenset(arguments)

    def forward(
        self, hidden_states: Tensor, *_args: Any, mixer_call: MixerCall | None = None, **others: Any
    ) -> tuple[Tensor, None]:
        """`hidden_states: [B, T, M]` -> `[B, T, M]`. Masks, caches and rotary positions that the teacher's module would
        take are not used: documents, padding and state are in the call.

        Raises:
            InputError: a call that did not come through the backbone, an argument that the teacher's module would not
                take, or one branch of a mixer that has only one.
        """
        mixer_call = require_call(mixer_call, self)
        refuse_unread(self, others, self.arguments)
        if (branch := mixer_call.branch_of(self.layer_idx)) != "both":
            name = self.mixer.config.name  # type: ignore[attr-defined]
            raise InputError(f"branch {branch!r}: layer {self.layer_idx} holds {name}, which has no branches")
        mixer = self.mixer
        if mixer_call.cache is None:
            return mixer(hidden_states, layout=mixer_call.layout, need_state=False)[0], None

        def run(raw: Pending, *, outputs: slice, **options: Any) -> tuple[Tensor, Any]:
            asked = outputs.stop - outputs.start
            return mixer.mix(*raw.inputs, layout=raw.layout, outputs=asked, **options)

        def cached(projected: tuple[Tensor, ...]) -> Tensor:
            return through_cache(mixer_call, self.layer_idx, mixer, projected, run)

        return mixer(hidden_states, layout=mixer_call.layout, cached=cached)[0], None
