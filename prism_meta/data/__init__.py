"""From files on disk to batches: cases, preprocessing, masks and episodes."""
