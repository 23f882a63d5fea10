"""Chat: answers to MT-Bench and AlpacaEval in the official formats, and a judge at an OpenAI-compatible endpoint."""
