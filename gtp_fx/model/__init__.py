"""Entry points (`optimize`, the backend, planning, export) and the nn.Module that `optimize` returns."""
