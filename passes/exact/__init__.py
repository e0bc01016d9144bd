"""Passes that change no number: every model gets them."""
