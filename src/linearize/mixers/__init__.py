"""Sequence mixers, one file each; a new mixer is one file and one row of `MIXERS`."""

from __future__ import annotations

from linearize.mixers.base import AttentionMixer, AttentionShape, Mixer, MixerConfig, MixerCost
from linearize.mixers.gated_delta_net import GatedDeltaNetConfig
from linearize.mixers.gla import GlaConfig
from linearize.mixers.layer_mixer import LayerMixer
from linearize.mixers.lolcats import LolcatsConfig
from linearize.mixers.mamba import MambaConfig
from linearize.mixers.mamba2 import Mamba2Config
from linearize.mixers.retention import RetentionConfig
from linearize.mixers.retrieval_heads import RetrievalHeadsConfig
from linearize.mixers.sliding_window import SlidingWindowConfig

__all__ = ["LAYERS", "MIXERS", "AttentionMixer", "AttentionShape", "LayerMixer", "Mixer", "MixerConfig", "MixerCost"]

MIXERS: dict[str, type[MixerConfig]] = {
    "gated_delta_net": GatedDeltaNetConfig,
    "gla": GlaConfig,
    "lolcats": LolcatsConfig,
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "retention": RetentionConfig,
    "sliding_window": SlidingWindowConfig,
}

# What a layer of a student may hold: a mixer of the table, alone or beside heads that keep their attention.
LAYERS: dict[str, type[MixerConfig]] = {**MIXERS, "retrieval_heads": RetrievalHeadsConfig}
