"""Dice on cases that the training does not see, and what is chosen by it."""
