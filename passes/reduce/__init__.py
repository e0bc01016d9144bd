"""Passes that carry out a plan: they remove tokens, or let them skip a branch."""
