"""Weights that hide no mistake: real spread in every parameter, for models of any library.

As initialised, a transformer's attention is uniform and its LayerScale next to nothing, so a wrong answer looks right.
"""

from __future__ import annotations

import torch
from torch import nn

_SCALES = ("lambda", "gamma", "ls1", "ls2", "layer_scale")
"""What LayerScale is called, in parts of parameters' names."""


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """New parameters, in place, the same for the same seed: LayerScale away from 0, attention that is selective."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if any(scale in name for scale in _SCALES):
            parameter.copy_(0.5 + 0.5 * noise.abs().clamp(max=1))
        elif parameter.ndim <= 1:
            parameter.add_(0.1 * noise)
        elif parameter.numel():
            parameter.copy_(1.4 * noise * parameter[0].numel() ** -0.5)
    return model
