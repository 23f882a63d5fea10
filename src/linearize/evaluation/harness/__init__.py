"""Tasks through lm-eval: its runner, its task definitions, its metric names; local files in the place of the Hub."""
