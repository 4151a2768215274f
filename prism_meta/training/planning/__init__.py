"""Sizes of the patch, the batch and the network from the data, the memory and the time."""
