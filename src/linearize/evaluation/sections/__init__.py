"""The parts of an evaluation: a module each, or a folder of `measure.py`, `present.py` and what they need."""
