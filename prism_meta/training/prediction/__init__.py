"""Predictors of several runs, and what to expect of them."""
