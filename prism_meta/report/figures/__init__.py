"""Figures of a report, each as a data URI: scores, training curves, and slices."""
