"""Tokens in another order than the grid's, or only some of them: they keep their places, and are told apart by them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gtp_fx
from bench.counted import flops
from bench.dynamo_door import Door
from bench.live_weights import enliven

from support.plain_vit import WIDTH, PlainViT, built, images

ORDER = torch.randperm(36, generator=torch.Generator().manual_seed(3))
GTP = gtp_fx.GTP(alpha=0.3, neighbors=4)
SCHEDULE = [10, 6, 0]


def ids(images: int, count: int = 20) -> Tensor:
    """So many patches of each image, [images, count], in no order."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(36, generator=generator)[:count] for _ in range(images)])


class Picked(PlainViT):
    """A ViT over the patches that `pick` makes of all of them, positions added: [B, 36, C] -> [B, K, C]."""

    def __init__(self, pick: Callable[..., Tensor]) -> None:
        super().__init__()
        self.pick = pick

    def forward(self, image: Tensor, *numbers: Tensor) -> Tensor:
        x = self.tokens(image)
        x = torch.cat([x[:, :1], self.pick(x[:, 1:], *numbers)], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


def as_given(x: Tensor) -> Tensor:
    return x


def in_blocks(x: Tensor) -> Tensor:
    return x.view(-1, 3, 2, 3, 2, WIDTH).transpose(2, 3).reshape(x.shape)


def by_gather(x: Tensor, numbers: Tensor) -> Tensor:
    return x.gather(1, numbers.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def by_rows(x: Tensor, numbers: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0])[:, None], numbers]


def alive(pick: Callable[..., Tensor]) -> Any:
    return enliven(built(partial(Picked, pick))).requires_grad_(False)


def fast(pick: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Any:
    asked = {"schedule": SCHEDULE, "strategy": GTP} | options
    return gtp_fx.optimize(alive(pick), example_inputs=inputs, compile=False, **asked)


@torch.no_grad()
@pytest.mark.parametrize(
    ("pick", "numbers"),
    [
        pytest.param(lambda x: x[:, ORDER], (), marks=pytest.mark.nightly),
        (by_gather, (ORDER.expand(2, -1),)),
        pytest.param(in_blocks, (), marks=pytest.mark.nightly),
        pytest.param(lambda x: x.unflatten(1, (6, 6)).flip(2).roll(2, 1).flatten(1, 2), (), marks=pytest.mark.nightly),
    ],
    ids=["by numbers", "by numbers that come in", "in blocks", "mirrored and rolled"],
)
def test_another_order_gives_the_same_result_and_tells_of_the_same_patches(
    pick: Callable[..., Tensor], numbers: tuple[Tensor, ...]
) -> None:
    """Attention doesn't read the order, and neighbours go by places: the same patches leave, for the same others."""
    x, other = images(), images(3)
    more = tuple(number[:1].expand(3, -1) for number in numbers)
    ordered, another = fast(as_given, x), fast(pick, x, *numbers)
    torch.testing.assert_close(another(other, *more), ordered(other), rtol=1e-5, atol=1e-5)
    (wanted,), (found,) = ordered.provenance(other), another.provenance(other, *more)
    assert found.grid == wanted.grid == (6, 6)
    assert torch.equal(found.index.sort(1).values, wanted.index)
    by_place = found.matrix.gather(1, found.index.argsort(1)[..., None].expand(-1, -1, 36))
    torch.testing.assert_close(by_place, wanted.matrix)


@torch.no_grad()
@pytest.mark.parametrize("pick", [by_gather, pytest.param(by_rows, marks=pytest.mark.nightly)])
def test_some_patches_of_each_image_lose_tokens_by_their_own_places(pick: Callable[..., Tensor]) -> None:
    """A masked autoencoder's encoder, patch dropout: what the rest holds is what those patches alone would give."""
    model, x, numbers = alive(pick), images(3), ids(3)
    made = fast(pick, images(), ids(2), schedule=[5, 3, 0])
    assert flops(made, (x, numbers)) / flops(model, (x, numbers)) == pytest.approx(made.report.flops_ratio, abs=1e-3)
    torch.testing.assert_close(made(x[1:2], numbers[1:2]), made(x, numbers)[1:2], rtol=1e-5, atol=1e-5)
    (found,) = made.provenance(x, numbers)
    assert found.grid == (6, 6) and found.matrix.shape == (3, 12, 36)
    for matrix, index, its in zip(found.matrix, found.index, numbers, strict=True):
        assert set(index.tolist()) <= set(its.tolist())
        assert set(matrix.sum(0).nonzero()[:, 0].tolist()) <= set(its.tolist())
        # With GTP nothing goes further than to neighbours, on the grid or among the four most similar.
        assert torch.equal(matrix.argmax(1), index)


def similar_and_touching(x_NC: Tensor, places_N: Tensor) -> Tensor:
    """The edges [N, N] of GTP's mixed graph over tokens at these places of a 6 x 6 grid, written from the method."""
    cosine = F.cosine_similarity(x_NC[:, None], x_NC[None], dim=-1).fill_diagonal_(-2)
    near = torch.zeros_like(cosine).scatter_(1, cosine.topk(4).indices, 1.0)
    rows, columns = (side[:, None] - side[None] for side in (places_N // 6, places_N % 6))
    touch = torch.maximum(rows.abs(), columns.abs()) == 1
    return ((near > 0) | touch).float()


@torch.no_grad()
def test_edges_go_by_the_places_that_the_numbers_say() -> None:
    """Who receives a removed token, and how much, is the normalised adjacency of the picked patches alone."""
    model, x, numbers = alive(by_gather), images(), ids(2)
    made = fast(by_gather, x, numbers, schedule=[5, 0, 0])
    (found,) = made.provenance(x, numbers)
    tokens = by_gather(model.tokens(x)[:, 1:], numbers)
    for image in range(2):
        edges = similar_and_touching(tokens[image], numbers[image])
        degree = edges.sum(1)
        shares = 0.3 * edges * (degree[:, None] * degree[None]).rsqrt() + torch.eye(20)
        rows = [numbers[image].tolist().index(place) for place in found.index[image].tolist()]
        kept = torch.zeros(20, dtype=torch.bool).index_fill(0, torch.tensor(rows), True)
        wanted = torch.zeros(len(rows), 36)
        wanted[:, numbers[image]] = torch.where(
            kept[None], F.one_hot(torch.tensor(rows), 20).float(), shares[torch.tensor(rows)]
        )
        torch.testing.assert_close(found.matrix[image], wanted)


class MaskedAutoencoder(PlainViT):
    """An encoder of the patches that noise leaves, and a decoder of all of them, in their places again."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(*(type(self.blocks[0])() for _ in range(1)))
        self.mask = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pixels = nn.Linear(WIDTH, 48)

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        x = self.tokens(image)
        shuffled = noise.argsort(1)
        back = shuffled.argsort(1)
        x = self.norm(self.blocks(torch.cat([x[:, :1], by_gather(x[:, 1:], shuffled[:, :20])], 1)))
        masks = self.mask.repeat(x.shape[0], back.shape[1] + 1 - x.shape[1], 1)
        whole = by_gather(torch.cat([x[:, 1:], masks], 1), back)
        x = torch.cat([x[:, :1], whole], 1) + self.position
        return self.pixels(self.decoder(x))[:, 1:]  # type: ignore[no-any-return]


@pytest.mark.nightly
@torch.no_grad()
def test_a_masked_autoencoder_loses_tokens_in_its_encoder_and_has_all_of_them_in_its_decoder() -> None:
    model = enliven(built(MaskedAutoencoder)).requires_grad_(False)
    inputs = images(), torch.rand(2, 36, generator=torch.Generator().manual_seed(2))
    others = images(3), torch.rand(3, 36, generator=torch.Generator().manual_seed(4))
    exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=inputs, compile=False)
    torch.testing.assert_close(exact(*others), model(*others), rtol=1e-4, atol=1e-5)
    made = gtp_fx.optimize(model, flops_budget=0.9, example_inputs=inputs, compile=False)
    assert flops(made, others) <= 0.9 * flops(model, others)
    assert {site.layer for site in made.report.sites} <= {"blocks.0", "blocks.1", "blocks.2"}
    assert made(*others).shape == (3, 36, 48)


@torch.no_grad()
def test_a_mask_is_refused_by_name() -> None:
    with pytest.raises(gtp_fx.GtpError, match="a mask picks tokens"):
        fast(lambda x: x[:, torch.arange(36) % 3 > 0], images(), flops_budget=0.7, schedule="auto")


@torch.no_grad()
@pytest.mark.nightly
def test_one_schedule_and_one_result_through_both_doors() -> None:
    torch._dynamo.reset()
    model, x, numbers = alive(by_gather), images(3), ids(3)
    made = fast(by_gather, images(), ids(2), flops_budget=0.7, schedule="auto")
    door = Door(flops_budget=0.7, strategy=GTP)
    found = torch.compile(model, backend=door, fullgraph=True)(x, numbers)
    assert [each.schedule for each in door.made] == [made.schedule]
    torch.testing.assert_close(found, made(x, numbers), rtol=1e-5, atol=1e-5)
