"""Whether a student has a window and a linear branch to tell apart."""

from __future__ import annotations

from collections.abc import Sequence

from linearize.mixers import MixerConfig
from linearize.mixers.gla import GlaConfig
from linearize.mixers.layer_mixer import LayerMixerConfig
from linearize.mixers.lolcats import LolcatsConfig
from linearize.ops.window_linear.window import ring_slots


def window_reach(plan: Sequence[MixerConfig | None]) -> int | None:
    """Tokens that the longest window of both-branched mixers reaches back, the query itself included.

    None where no mixer has both branches, or where one has none: then the branches cannot be run alone.
    """
    if any(isinstance(mixer, LayerMixerConfig) for mixer in plan):
        return None
    both = [mixer for mixer in plan if isinstance(mixer, (LolcatsConfig, GlaConfig)) and mixer.window]
    return max((ring_slots(mixer.window, mixer.window_shape) + 1 for mixer in both), default=None)
