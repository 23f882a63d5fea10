"""Speculative decoding: a draft proposes tokens, the target verifies them in one pass, the text stays the target's."""

from linearize.decoding.speculative.drafters import Drafter, LookupDrafter, ModelDrafter
from linearize.decoding.speculative.loop import speculate
from linearize.decoding.speculative.stats import SpeculationResult, SpeculationStats
from linearize.decoding.speculative.weight_layout import share_equal_weights

__all__ = [
    "Drafter",
    "LookupDrafter",
    "ModelDrafter",
    "SpeculationResult",
    "SpeculationStats",
    "share_equal_weights",
    "speculate",
]
