"""PRISM's network, and a wrapper for any other."""
