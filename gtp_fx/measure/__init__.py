"""Time measurements: comparing models, measuring a machine's rates, tuning kernels' tiles."""
