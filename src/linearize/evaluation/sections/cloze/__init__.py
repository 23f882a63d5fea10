"""Scoring against generation."""

from linearize.evaluation.sections.cloze.measure import Cloze as Cloze
