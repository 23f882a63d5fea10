"""What each branch of a student brings."""

from linearize.evaluation.sections.branches.measure import Branches as Branches
