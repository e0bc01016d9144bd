"""Rewrites of what is about to be compiled: GTP's operators as the kernels that a processor has."""
