"""The user's options as validated values."""
