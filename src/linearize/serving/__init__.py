"""Students served to others."""
