"""Sequence mixers, one file each; a new mixer is one file and one row of `MIXERS`."""

from __future__ import annotations

from linearize.mixers.base import AttentionMixer, AttentionShape, Mixer, MixerConfig, MixerCost
from linearize.mixers.layer_mixer import LayerMixer
from linearize.mixers.lolcats import LolcatsConfig
from linearize.mixers.sliding_window import SlidingWindowConfig

__all__ = ["MIXERS", "AttentionMixer", "AttentionShape", "LayerMixer", "Mixer", "MixerConfig", "MixerCost"]

MIXERS: dict[str, type[MixerConfig]] = {
    "lolcats": LolcatsConfig,
    "sliding_window": SlidingWindowConfig,
}
