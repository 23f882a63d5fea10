"""Speculative decoding: a draft guesses tokens, the target checks them in one pass, the text stays the target's own."""

from linearize.decoding.speculative.drafters import Drafter, LookupDrafter, ModelDrafter
from linearize.decoding.speculative.loop import speculate
from linearize.decoding.speculative.sharing import share_equal_weights
from linearize.decoding.speculative.stats import SpeculationResult, SpeculationStats

__all__ = [
    "Drafter",
    "LookupDrafter",
    "ModelDrafter",
    "SpeculationResult",
    "SpeculationStats",
    "share_equal_weights",
    "speculate",
]
