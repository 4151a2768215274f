"""The configuration of a run: its schema, its file format, and the baselines."""

from prism_meta.training.config.schema import Config, load_config

__all__ = ["Config", "load_config"]
