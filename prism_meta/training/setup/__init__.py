"""The cases of a training: found, prepared, split and checked."""
