"""Tasks by lm-eval: its definitions, its runner, its metrics, on teacher and students."""
