"""Compiling a graph in sections, so that blocks which differ in nothing but numbers of tokens are compiled once."""
