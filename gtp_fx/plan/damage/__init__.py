"""Damage, in `tables`: guessed by `prior`, measured by `sensitivity` (in `divergence`), improved by `refinement`."""
