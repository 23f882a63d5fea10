"""Speed and memory."""

from linearize.evaluation.sections.speed.measure import Speed as Speed
