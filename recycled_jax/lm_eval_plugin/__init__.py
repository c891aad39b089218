"""A model for lm-evaluation-harness; `recycled lm-eval` runs the harness with it."""
