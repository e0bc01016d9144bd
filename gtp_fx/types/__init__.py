"""Types: which dimension of each value runs over which tokens."""
