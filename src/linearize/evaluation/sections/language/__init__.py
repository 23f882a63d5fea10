"""Language modelling on held-out text."""

from linearize.evaluation.sections.language.measure import Language as Language
