"""Benchmarks; each runs from a checkout, installed or not, and writes JSON that says where it was measured.

    eager_vs_compiled   speed-up of an optimised model, eager and compiled, interleaved
    optimize_time       what optimising costs beside torch.export

Results that the README quotes are in results/.
"""
