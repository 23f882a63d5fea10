"""The parts of an evaluation, one file each, and the one literal table of them."""
