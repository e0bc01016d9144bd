"""Passes that carry out a plan: tokens leave, or skip a branch."""
