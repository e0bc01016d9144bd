"""Analyses of a typed graph: attention blocks, branches, liveness. Nothing here changes a graph."""
