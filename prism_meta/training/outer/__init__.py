"""The outer optimizer, its schedule, and what is measured of its steps."""
