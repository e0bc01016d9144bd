"""Token-axis types: where domains are born, how each family of operators carries them, where a walk has to stop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.ops import aten

from gtp_fx.types.axes import Plain, TokenAxis, TokenDomain, size, token_axis
from gtp_fx.types.coercions import find_coercions
from gtp_fx.types.grids import Grid
from gtp_fx.types.infer import infer_types, infer_with_sites
from gtp_fx.types.merging import product
from gtp_fx.types.rules.registry import NoRule
from gtp_fx.types.rules.views import regroup

from support.graphs_by_hand import node, patches, traced

IMAGE = torch.zeros(2, 3, 6, 4)  # 3 x 2 patches of 2 pixels
WEIGHT = torch.zeros(8, 3, 2, 2)
GRID = Grid("conv", (3, 2))
TOKENS = TokenAxis(TokenDomain(GRID))


def axis_of(function: Callable[[Tensor], Tensor], dim: int) -> TokenAxis | None:
    """The token axis of dimension `dim` of what `function` makes of six patch tokens [2, 6, 8]."""
    gm = traced(lambda image, weight: function(patches(image, weight)), IMAGE, WEIGHT)
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    (result,) = output.all_input_nodes
    return token_axis(infer_types(gm.graph).type(result)[dim])


def test_a_domain_is_born_where_a_grid_is_flattened() -> None:
    axis = axis_of(lambda x: x, 1)
    assert axis is not None
    assert (axis.domain.grid.shape, axis.prefix, axis.suffix, axis.domain.level) == ((3, 2), 0, 0, 0)


def test_size_follows_the_tokens_left() -> None:
    axis = TokenAxis(TOKENS.domain.at(1), prefix=1, suffix=2)
    assert size((Plain(3), axis), lambda domain: 4 if domain.level == 1 else 6) == 3 * (1 + 4 + 2)


def test_views_split_and_merge_plain_factors_around_tokens() -> None:
    assert regroup([Plain(2), TOKENS, Plain(12)], (2, 6, 3, 4)) == (
        (Plain(2),),
        (TOKENS,),
        (Plain(3),),
        (Plain(4),),
    )
    assert regroup([Plain(2), TOKENS, Plain(12)], (12, 12)) == ((Plain(2), TOKENS), (Plain(12),))
    assert regroup([Plain(2), TOKENS], (1, 2, 1, 6)) == ((Plain(1),), (Plain(2),), (Plain(1),), (TOKENS,))
    assert product([Plain(1), Plain(1)]) == (Plain(1),)


@pytest.mark.parametrize("shape", [(2, 2, 3, 12), (4, 3, 12), (3, 48)])
def test_a_view_never_cuts_through_a_token_axis(shape: tuple[int, ...]) -> None:
    with pytest.raises(NoRule):
        regroup([Plain(2), TOKENS, Plain(12)], shape)


@pytest.mark.parametrize(
    ("function", "dim", "prefix", "suffix"),
    [
        (lambda x: torch.cat([torch.zeros(2, 1, 8), x], 1), 1, 1, 0),
        (lambda x: torch.cat([torch.zeros(2, 2, 8), x, torch.zeros(2, 3, 8)], 1), 1, 2, 3),
        (lambda x: torch.cat([torch.zeros(2, 4, 8), x], 1)[:, 1:], 1, 3, 0),
        (lambda x: torch.cat([torch.zeros(2, 4, 8), x, torch.zeros(2, 1, 8)], 1)[:, 4:-1], 1, 0, 0),
        (lambda x: x + torch.zeros(1, 6, 8), 1, 0, 0),
        (lambda x: torch.zeros(6, 8) + x, 1, 0, 0),
        (lambda x: x.reshape(2, 6, 2, 4).permute(0, 2, 1, 3), 2, 0, 0),
        (lambda x: torch.nn.functional.gelu(x * 2.0).unsqueeze(1), 2, 0, 0),
        (lambda x: x.reshape(2, 6, 2, 4).unbind(2)[1], 1, 0, 0),
        (lambda x: x.chunk(2, dim=-1)[0], 1, 0, 0),
        (lambda x: x.reshape(12, 8).reshape(2, 6, 8), 1, 0, 0),
    ],
)
def test_operators_carry_the_axis(function: Callable[[Tensor], Tensor], dim: int, prefix: int, suffix: int) -> None:
    axis = axis_of(function, dim)
    assert axis is not None
    assert (axis.prefix, axis.suffix) == (prefix, suffix)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x[:, 2], "selected by its position"),
        (lambda x: x[:, 1:4], "taken by their position"),
        (lambda x: x.sum(dim=1), "adds up tokens"),
        (lambda x: x.transpose(1, 2) @ torch.zeros(2, 6, 5), "adds up tokens"),
        (lambda x: torch.nn.functional.linear(x.transpose(1, 2), torch.zeros(4, 6)), "run over tokens"),
        (lambda x: torch.nn.functional.layer_norm(x, [6, 8]), "run over tokens"),
        (lambda x: x.cumsum(dim=1), "no rule"),
        (lambda x: torch.cat([x, x], dim=1), "end to end"),
    ],
)
def test_what_mixes_tokens_by_position_asks_for_them_whole(function: Callable[[Tensor], Tensor], reason: str) -> None:
    """Behind a site, every such operator gets its tokens back or is refused; none is guessed at."""
    gm = traced(lambda image, weight: function(patches(image, weight) * 1.0), IMAGE, WEIGHT)
    site = node(gm, aten.mul.Tensor)
    coercions = find_coercions(infer_with_sites(gm.graph, frozenset({site})))
    asked = [*(coercion.reason for coercion in coercions.found), *(refusal.reason for refusal in coercions.refused)]
    assert asked
    assert reason in asked[0]
    assert all(step.recovers for coercion in coercions.found for step in coercion.steps)
    untouched = find_coercions(infer_with_sites(gm.graph, frozenset()))
    assert not (untouched.found or untouched.refused), "with every token there, nothing is asked for"


def test_a_whole_value_beside_a_shortened_stream_is_taken_from() -> None:
    def long_skip(image: Tensor, weight: Tensor) -> Tensor:
        x = patches(image, weight)
        return (x * 1.0 + x)[:, :1] * 0

    gm = traced(long_skip, IMAGE, WEIGHT)
    coercions = find_coercions(infer_with_sites(gm.graph, frozenset({node(gm, aten.mul.Tensor)}))).found
    skip = next(coercion for coercion in coercions if coercion.node.target is aten.add.Tensor)
    assert [(step.dim, step.level, step.recovers) for step in skip.steps] == [(1, 1, False)]
    assert (skip.lead, skip.images) == (0, 0)


def test_a_table_without_images_gets_their_dimension() -> None:
    """As rotary tables [N, D] do beside queries [B, H, N, D]."""

    def rotary(image: Tensor, weight: Tensor, table: Tensor) -> Tensor:
        x = (patches(image, weight) * 1.0).reshape(2, 6, 4, 2).transpose(1, 2)
        return x * table

    gm = traced(rotary, IMAGE, WEIGHT, torch.ones(6, 2))
    coercions = find_coercions(infer_with_sites(gm.graph, frozenset({node(gm, aten.mul.Tensor)}))).found
    taken = next(coercion for coercion in coercions if coercion.node.target is aten.mul.Tensor)
    assert (taken.lead, taken.images, [step.dim for step in taken.steps]) == (2, 0, [2])


def test_a_newer_level_wins_where_two_meet() -> None:
    def skip(image: Tensor, weight: Tensor) -> Tensor:
        x = patches(image, weight)
        return x * 1.0 + x

    gm = traced(skip, IMAGE, WEIGHT)
    typing = infer_with_sites(gm.graph, frozenset({node(gm, aten.mul.Tensor)}))
    axis = token_axis(typing.type(node(gm, aten.add.Tensor))[1])
    assert axis is not None
    assert axis.domain.level == 1
