"""Reports on what was planned and done, in numbers and pictures."""
