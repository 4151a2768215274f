"""Losses (E5-E9), their weights (E11, E12) and their sum (E10)."""
