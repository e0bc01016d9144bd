"""What was asked for, as validated values."""
