"""The cache against one full forward pass."""

from linearize.evaluation.sections.consistency.measure import Consistency as Consistency
