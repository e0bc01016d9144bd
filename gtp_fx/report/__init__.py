"""What was planned and done, in numbers and pictures."""
