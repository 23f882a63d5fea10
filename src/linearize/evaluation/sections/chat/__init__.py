"""Answers to chat benchmarks."""

from linearize.evaluation.sections.chat.measure import Chat as Chat
