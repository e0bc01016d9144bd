"""What a pass rewrites, twice and thrice in a row: the second one reads what the first has just been replaced by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gtp_fx

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) / 3

TWICE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda x, w: torch.einsum("bnc,cd->bnd", torch.einsum("bcn,dc->bnd", x.mT, w), w),
    "einsum of einsums": lambda x, w: torch.einsum("bnc,bmc->bnm", *[torch.einsum("bnc,dc->bnd", x, w)] * 2),
    "matmul": lambda x, w: x @ w @ w.mT @ w,
    "addmm": lambda x, w: torch.addmm(w[0], torch.addmm(w[1], x.flatten(0, 1), w), w.mT).view(x.shape),
    "convolution with a kernel of one": lambda x, w: F.conv1d(F.conv1d(x.mT, w[:, :, None]), w[:, :, None]),
    "chunk": lambda x, w: x.chunk(2, -1)[1].chunk(2, -1)[0] @ w[:2],
    "split": lambda x, w: x.split([3, 5], -1)[1].split(2, -1)[1] @ w[:2],
    "unbind": lambda x, w: torch.stack(x.unflatten(-1, (2, 4)).unbind(2)[1].unbind(1)),
    "sum of a stack": lambda x, w: torch.stack([torch.stack([x, x @ w]).sum(0), x]).sum(0),
    "stack, merged": lambda x, w: torch.stack([x, x @ w], 1).flatten(1, 2) @ w,
    "views": lambda x, w: x.unflatten(-1, (2, 4)).flatten(2).unflatten(-1, (4, 2)).flatten(2).unflatten(1, (3, 3)) * 2,
    "attention": lambda x, w: (lambda y: (y @ y.mT).softmax(-1) @ y)((x @ x.mT).softmax(-1) @ x),
    "linear": lambda x, w: F.linear(F.linear(x, w), w) + F.linear(F.linear(x, w), w.mT),
    "norm by hand": lambda x, w: F.layer_norm(F.layer_norm(x @ w, (8,)) - x.mean(-1, keepdim=True), (8,)),
}


class Twice(nn.Module):
    """A patch grid, some blocks' worth of nothing, and the function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.patch, self.weight, self.function = nn.Conv2d(3, 8, 2, 2), nn.Parameter(WEIGHT), function
        self.qkv = nn.Linear(8, 24)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.function(x + F.scaled_dot_product_attention(q, k, v), self.weight)


@pytest.mark.parametrize("name", TWICE)
def test_twice_in_a_row(name: str) -> None:
    model = Twice(TWICE[name]).eval().requires_grad_(False)
    image = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=image, compile=False)
    torch.testing.assert_close(exact(image), model(image), rtol=1e-5, atol=1e-5)
