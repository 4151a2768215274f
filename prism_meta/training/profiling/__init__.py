"""Time, memory and FLOPs of predictions and of outer steps."""
