"""Layer by layer."""

from linearize.evaluation.sections.layers.measure import Layers as Layers
