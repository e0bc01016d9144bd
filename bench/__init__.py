"""Benchmarks; each runs from a checkout, installed or not."""
