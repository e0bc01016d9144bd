"""flex_attention in a forward: opened at both doors, with what its functions do to scores, and tokens removed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import gtp_fx
from bench.dynamo_door import Door
from gtp_fx.graph.torch_internals import region_operator

from support.zoo import enliven

WIDTH, HEADS, TOKENS = 32, 4, 17
pytestmark = [
    pytest.mark.nightly,  # torch's own eager flex_attention takes seconds
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def near(_image: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query - key).abs() < 12


class Block(nn.Module):
    def __init__(self, change: str, masked: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.table = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.mask = create_block_mask(near, None, None, TOKENS, TOKENS, device="cpu") if masked else None
        self.change = change

    def function(self) -> Callable[..., Tensor] | None:
        table = self.table
        return {
            "": None,
            "table": lambda score, image, head, query, key: score + table[head, query, key],
            "distance": lambda score, image, head, query, key: score - (query - key).abs() * 0.1 * (head + 1),
            "cap": lambda score, image, head, query, key: 5 * torch.tanh(score / 5),
        }[self.change]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).reshape(len(x), -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = flex_attention(q, k, v, score_mod=self.function(), block_mask=self.mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Net(nn.Module):
    def __init__(self, change: str, masked: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block(change, masked) for _ in range(2)))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        return self.head(self.blocks(x)[:, 0])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "masked"),
    [
        ("table", True),
        ("", False),
        ("distance", False),
        ("cap", False),
    ],
)
def test_flex_attention_is_opened_at_both_doors(change: str, masked: bool) -> None:
    model, x = enliven(Net(change, masked)).eval(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        wanted = model(x)
        exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=x, compile=False)
        torch.testing.assert_close(exact(x), wanted, rtol=1e-4, atol=1e-4)
        assert not any(region_operator(node.target) for node in exact.graph_module.graph.nodes)
        fast = gtp_fx.optimize(model, schedule=[4, 0], example_inputs=x, compile=False)
        assert fast(x).isfinite().all()
        torch._dynamo.reset()
        door = Door(schedule=[4, 0])
        torch.testing.assert_close(torch.compile(model, backend=door)(x), fast(x), rtol=1e-4, atol=1e-4)
        assert [made.schedule for made in door.made] == [fast.schedule]


def test_one_whose_functions_cant_be_read_is_left_and_named() -> None:
    """A function that isn't of one score alone, as torch allows it where it is run without being compiled."""
    model = enliven(Net("cap", False)).eval()
    for block in model.blocks:
        block.function = lambda: lambda score, image, head, query, key: score + torch.rand_like(score)  # type: ignore
    with torch.no_grad(), pytest.raises(gtp_fx.UnsupportedModelError, match="flex_attention"):
        gtp_fx.optimize(model, flops_budget=0.8, example_inputs=torch.randn(3, 3, 16, 16), compile=False)
