"""An OpenAI-compatible server: `linearize serve`. What needs the extra `[serve]` is imported when it is called."""
