"""Which dimension of each value runs over which tokens."""
