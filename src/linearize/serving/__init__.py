"""Students served to others: `linearize serve`, and a plugin for vLLM. Their libraries are imported when they run."""
