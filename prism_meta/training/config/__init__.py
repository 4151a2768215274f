"""The settings of a run: their schema, the files that hold them, and known methods."""

from prism_meta.training.config.schema import Config, load_config

__all__ = ["Config", "load_config"]
