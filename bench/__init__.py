"""Benchmarks; each runs from a checkout, installed or not, and writes JSON that says where it was measured.

    eager_vs_compiled   speed-up of an optimised model, eager and compiled, interleaved
    optimize_time       what optimising costs beside torch.export
    digit_nets          small nets trained on digits that come with scikit-learn, for accuracy; `pip install -e ".[bench]"`

Results that the README quotes are in results/.
"""
