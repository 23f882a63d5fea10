"""Sequence mixers, one file each; a new mixer is one file and one row of `MIXERS`, or a package that registers it."""

from __future__ import annotations

from collections import ChainMap
from typing import TypeVar

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
from linearize.registry import Table, config_name, named_config

__all__ = [
    "LAYERS", "MIXERS", "AttentionMixer", "AttentionShape", "LayerMixer", "Mixer", "MixerConfig", "MixerCost",
    "mixer_package", "register_mixer",
]  # fmt: skip

Config = TypeVar("Config", bound=MixerConfig)
_OWN: dict[str, type[MixerConfig]] = {
    "gated_delta_net": GatedDeltaNetConfig,
    "gla": GlaConfig,
    "lolcats": LolcatsConfig,
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "retention": RetentionConfig,
    "sliding_window": SlidingWindowConfig,
}

MIXERS: Table[type[MixerConfig]] = Table("mixer", "linearize.mixers", _OWN, named_config(MixerConfig))

# What a layer of a student may hold: a mixer of the table, alone or beside heads that keep their attention.
LAYERS: ChainMap[str, type[MixerConfig]] = ChainMap({"retrieval_heads": RetrievalHeadsConfig}, MIXERS)  # type: ignore[arg-type]  # only read


def mixer_package(config: MixerConfig) -> str | None:
    """The package to install to have a mixer, or the one that it has in other heads; None for our own and for one
    that is not registered."""
    name = config_name(type(config.inner))
    return MIXERS.package(name) if name not in MIXERS.own and name in MIXERS else None


def register_mixer(config: type[Config]) -> type[Config]:
    """Let recipes, plans and students' folders name a mixer of another package; returns the class, so it decorates.

    `config` derives from `MixerConfig`, its field `name` has the mixer's name as default, and `build(shape)` makes the
    mixer. A package that others install names the class in the entry-point group `linearize.mixers` instead, under the
    mixer's name, and is imported when a student or recipe asks for it.

    Raises:
        InputError: a name that is taken, or a class that is no mixer's config.
    """
    MIXERS.register(config_name(config), config)
    return config
