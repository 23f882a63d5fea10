"""Recall from far back."""

from linearize.evaluation.sections.recall.measure import Recall as Recall
