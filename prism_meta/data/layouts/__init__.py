"""How cases lie on disk, one module a layout."""
