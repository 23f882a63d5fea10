"""Benchmark tasks."""

from linearize.evaluation.sections.tasks.measure import Tasks as Tasks
