"""The ways in, and the nn.Module that comes back."""
