"""Conversions by blocks of layers: with the models in memory, or with weights that never are there as a whole."""
