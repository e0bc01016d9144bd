"""Passes on graphs about to be compiled or run: GTP's operators become the kernels that a processor has."""
