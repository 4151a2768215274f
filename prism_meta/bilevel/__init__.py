"""Two-level training: inner optimizers, strategies, the outer step, and checks before it."""
