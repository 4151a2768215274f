"""Prediction of whole volumes, and its measures on every subset of modalities."""
