"""Data: from files on disk to batches (cases, labels, availability, masks, preprocessing, episodes)."""
