"""Generation for people: a prompt continued, a conversation held, by students and teachers alike."""

from linearize.decoding.generate import chat, generate_text

__all__ = ["chat", "generate_text"]
