"""The run folder: its files, its lock, and what they say."""
