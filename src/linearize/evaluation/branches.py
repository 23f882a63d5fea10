"""Whether a student has a window and a linear branch to tell apart."""

from __future__ import annotations

from collections.abc import Sequence

from linearize.mixers import MixerConfig
from linearize.mixers.gla import GlaConfig
from linearize.mixers.layer_mixer import LayerMixerConfig
from linearize.mixers.lolcats import LolcatsConfig
from linearize.mixers.sliding_window import SlidingWindowConfig
from linearize.ops.window_linear.window import ring_slots


def window_reach(plan: Sequence[MixerConfig | None]) -> int | None:
    """Tokens that the plan's longest window reaches back, the query itself included.

    None where no mixer has both branches, or where one has none: then the branches cannot be run alone.
    """
    if any(isinstance(mixer, LayerMixerConfig) for mixer in plan):
        return None
    kinds = (LolcatsConfig, GlaConfig, SlidingWindowConfig)
    windows = [mixer for mixer in plan if isinstance(mixer, kinds) and mixer.window]
    if all(isinstance(mixer, SlidingWindowConfig) for mixer in windows):
        return None
    return max(ring_slots(mixer.window, mixer.window_shape) + 1 for mixer in windows)
