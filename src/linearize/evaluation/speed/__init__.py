"""Speed and memory: what is timed, how, and the check that comes before."""

from linearize.evaluation.speed.decode_cost import DecodeCost, decode_cost
from linearize.evaluation.speed.memory import cache_bytes, peak_bytes, weight_bytes

__all__ = ["DecodeCost", "cache_bytes", "decode_cost", "peak_bytes", "weight_bytes"]
