"""Data, stages, and the one loop that trains them."""
