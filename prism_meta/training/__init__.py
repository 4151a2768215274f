"""Training: the configuration, the objects built from it, the loop, and run folders."""
