"""Exports: a run as files that other software uses. The list is ``prism_meta.export.formats.FORMATS``."""
