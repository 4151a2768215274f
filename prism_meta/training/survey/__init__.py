"""What a data set has, and every fault of it."""
