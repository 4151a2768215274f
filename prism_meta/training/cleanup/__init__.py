"""The clean-up of labels that a run has: chosen on validation cases, and kept in a file."""
