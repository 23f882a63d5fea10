"""Decoding with students and teachers alike: generation, conversation, speculative decoding."""

from linearize.decoding.generate import chat, generate_text
from linearize.decoding.speculative import LookupDrafter, share_equal_weights, speculate

__all__ = ["LookupDrafter", "chat", "generate_text", "share_equal_weights", "speculate"]
