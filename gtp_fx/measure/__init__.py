"""Clocks: models compared, machines measured, tiles tuned."""
