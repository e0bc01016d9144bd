"""Every rule on a graph made by hand (`rule_rows`): the type it gives, and the numbers of the graph rewritten by it.

A row's function follows a block whose attention ranks its tokens; three of twelve patches leave there, others in each
image. The oracle knows no rule: it is the row's function itself, in eager PyTorch on the tokens that were left.

    types        what the rule says, and whether tokens come back for it
    numbers      the rewritten graph against the oracle, its shapes and FLOPs against the plan's
    unchanged    the twin: where nothing leaves, the graph stays as it is
    leading      `prefix_operands`: a head that reads a prefix token gets the same from a graph without dead ones
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.ops import aten
from torch.ops import gtp_fx as ops

import gtp_fx
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.errors import UnsupportedModelError
from gtp_fx.graph.edit import call, copy_of, finish
from gtp_fx.graph.symbols import is_symbolic, per_image
from gtp_fx.graph.verify import check_outputs, propagate_shapes
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import Schedule
from gtp_fx.passes.exact.drop_dead_tokens import drop_dead_tokens
from gtp_fx.passes.exact.mark_blocks import mark_blocks
from gtp_fx.passes.reduce.remove_tokens import SITE, remove_tokens
from gtp_fx.passes.runner import apply_plan_unverified
from gtp_fx.plan.cost.count import count_flops
from gtp_fx.plan.make_plan import Planned, make_plan
from gtp_fx.plan.plan import Plan
from gtp_fx.plan.problem import Original
from gtp_fx.types.axes import Dim, Plain, TokenAxis, plain, token_axis
from gtp_fx.types.coercions import find_coercions
from gtp_fx.types.grids import Grid, GridAxis
from gtp_fx.types.infer import SiteTyping, infer_types, infer_with_sites
from gtp_fx.types.rules import registry
from gtp_fx.types.rules.broadcasting import join
from gtp_fx.types.rules.contraction import _join_dim as join_summed
from gtp_fx.types.rules.ranges import getitem
from gtp_fx.types.rules.registry import NoRule, Output, TypeList
from gtp_fx.types.rules.views import regroup

from support.graphs_by_hand import patches, traced
from support.rule_rows import ROWS as OTHER_ROWS
from support.rule_rows import Refused, Row
from support.rule_rows_layout import REFUSED
from support.rule_rows_layout import ROWS as LAYOUT_ROWS

ROWS = [*OTHER_ROWS, *LAYOUT_ROWS]

STEM, LEAVE = Grid("conv2d", (4, 3)), 3
STRATEGY = gtp_fx.GTP(neighbors=3, token_scale=False, recovery="mean")
"""Attention that isn't told of token scales is the very function that the oracle calls."""

TOKEN_DIMS = {"old": (1,), "memory": (), "table": (0,), "bias": (1, 2), "w": ()}
"""What a row's function may ask for beside x, and the dimensions in which that holds something for every token."""

DRAWS = (aten.bernoulli.default, aten.bernoulli.p, aten.dropout.default, aten.native_dropout.default)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGE, EMBED, QKV, CLS = (random(*shape, seed=sum(shape)) for shape in ((5, 3, 8, 6), (8, 3, 2, 2), (24, 8), (1, 2, 8)))
GIVEN = {"table": random(14, 8, seed=4), "bias": random(2, 14, 14, seed=5), "w": random(8, 8, seed=6)}


def rows(test: str, *, all_by_default: bool = False) -> Any:
    """Return every row; those with a defect that shows in this test must fail.

    all_by_default: else an operator's rows beyond its first are left to the nightly tier.
    "leading" has no rows of operators in `DRAWS`: `prefix_needed` would draw other random numbers.
    """

    chosen = [row for row in ROWS if test != "leading" or row.operator not in DRAWS]
    marks = [defect(row.wrong if test in row.shows.split() else "") for row in chosen]
    first = {row.operator: row for row in reversed(chosen)}
    later = [[] if all_by_default or row is first[row.operator] else [pytest.mark.nightly] for row in chosen]
    params = [
        pytest.param(row, marks=[*m, *tier, one_process(row)], id=str(row.operator))
        for row, m, tier in zip(chosen, marks, later, strict=True)
    ]
    return pytest.mark.parametrize("row", params)


def one_process(row: Row) -> pytest.MarkDecorator:
    """A row's graph is traced once for all of its tests."""
    return pytest.mark.xdist_group(f"rules {ROWS.index(row) % 8}")


def defect(reason: str) -> list[Any]:
    return [pytest.mark.xfail(strict=True, reason=reason)] if reason else []


# ---- graphs


def stem(image: Tensor, embed: Tensor, cls: Tensor) -> Tensor:
    return torch.cat([cls.expand(image.shape[0], 2, 8), patches(image, embed) * 0.3], dim=1)


def block(x: Tensor, qkv: Tensor) -> Tensor:
    q, k, v = F.linear(x, qkv * 0.5).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def beside(row: Row | Refused) -> list[str]:
    """What the row's function asks for beside x."""
    return [name for name in inspect.signature(row.function).parameters if name in TOKEN_DIMS]


def inputs(row: Row | Refused) -> tuple[Tensor, ...]:
    return IMAGE, EMBED, QKV, CLS, *(GIVEN[name] for name in beside(row) if name in GIVEN)


@cache
def graph_of(row: Row | Refused) -> fx.GraphModule:
    """Stem, block and the row's function: their graph, its blocks marked, its batch a symbol as in a capture."""

    def run(image: Tensor, embed: Tensor, qkv: Tensor, cls: Tensor, *given: Tensor) -> Tensor:
        old = stem(image, embed, cls)
        have = dict(zip((name for name in beside(row) if name in GIVEN), given, strict=True))
        have |= {"old": old, "memory": old}
        return row.function(block(old, qkv), **{name: have[name] for name in beside(row)})

    return mark_blocks(traced(run, *map(fake, inputs(row))))


MODE = FakeTensorMode(shape_env=ShapeEnv())


@cache
def fake(x: Tensor) -> Tensor:
    if x is not IMAGE:
        return MODE.from_tensor(x, static_shapes=True)
    batch = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * 3])
    return MODE.from_tensor(x, symbolic_context=batch)


def under_test(operator: Any, gm: fx.GraphModule) -> fx.Node:
    """The operator's last call: the row's function makes it."""
    return [node for node in gm.graph.nodes if node.target is operator][-1]


def behind_the_site(gm: fx.GraphModule) -> SiteTyping:
    site = typed_graph(gm.graph).blocks[0].site
    assert site is not None
    return infer_with_sites(gm.graph, frozenset({site}))


def result_of(gm: fx.GraphModule) -> fx.Node:
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    (result,) = output.all_input_nodes
    return result


# ---- types as text


def spelled(kind: Output) -> str:
    """((Plain(batch),), (TokenAxis(level 1, prefix=2),), (Plain(2), Plain(4))) -> "B, 2+n1, 8"."""
    if isinstance(kind, TypeList):
        return " | ".join(map(spelled, kind.items))
    assert kind is not None
    return ", ".join(map(_dim, kind))


def _dim(dim: Dim) -> str:
    plain = math.prod(factor.size for factor in dim if isinstance(factor, Plain))
    number = str(plain)
    if is_symbolic(plain):
        number = "B" if per_image(plain) == 1 else f"{per_image(plain)}B"
    parts = [
        *([number] if number != "1" else []),
        *(_tokens(factor) for factor in dim if not isinstance(factor, Plain)),
    ]
    return "*".join(f"({part})" if "+" in part and len(parts) > 1 else part for part in parts) or "1"


def _tokens(factor: GridAxis | TokenAxis) -> str:
    if isinstance(factor, GridAxis):
        part = f"/{factor.count}by{factor.stride}" if factor.count else ""
        return f"{'g' if factor.grid == STEM else 'h'}{factor.side}{part}"
    patches = f"{'n' if factor.domain.grid == STEM else 'm'}{factor.domain.level}"
    return "+".join(str(part) for part in (factor.prefix, patches, factor.suffix) if part)


# ---- every rule


def test_every_operator_with_a_rule_has_a_row() -> None:
    assert {row.operator for row in ROWS} == set(registry._rules)


@rows("types", all_by_default=True)
def test_types_behind_a_site(row: Row) -> None:
    gm = graph_of(row)
    typing, node = behind_the_site(gm), under_test(row.operator, gm)
    assert spelled(typing.results[node].output) == row.typed
    coercions = find_coercions(typing)
    assert not coercions.refused
    recovered = [c.reason for c in coercions.found if c.node.op != "output" and any(s.recovers for s in c.steps)]
    reasons = {typing.results[node].barrier, *recovered} - {""}
    assert any(row.reason in reason for reason in reasons) if row.reason else not reasons


@rows("numbers")
def test_numbers_behind_a_site(row: Row) -> None:
    """Equal to the last bit where the function runs on the very tensor that the graph has.

    Tokens are made up again, and images taken one by one, by the same sums over other strides: 1e-5 on values around 1.
    """
    gm = graph_of(row)
    planned = plan_of(gm)
    shorter = remove_tokens(gm, planned.plan)
    propagate_shapes(shorter, "remove_tokens")
    check_outputs(gm, shorter)
    assert count_flops(shorter.graph) == planned.flops
    run = fx.Interpreter(shorter, garbage_collect_values=False)
    torch.manual_seed(0)
    run.run(*inputs(row))
    result = result_of(shorter)
    while result.target is ops.recover.default:  # for whom the model returns it to
        result = result.all_input_nodes[0]
    torch.manual_seed(0)
    same_tensor = row.reads == "left" and not any(TOKEN_DIMS[name] for name in beside(row))
    tolerance = {"rtol": 0, "atol": 0} if same_tensor else {}
    torch.testing.assert_close(run.env[result], by_hand(row, run.env), **tolerance)


@pytest.mark.nightly
@rows("unchanged")
def test_unchanged_where_nothing_leaves(row: Row) -> None:
    gm = finish(copy_of(graph_of(row)))  # without what nothing reads
    blocks = len(typed_graph(gm.graph).blocks)
    same = remove_tokens(gm, Plan(Schedule((0,) * blocks, (12,) * blocks), (), STRATEGY))
    propagate_shapes(same, "remove_tokens")
    assert calls(same) == calls(gm)
    torch.manual_seed(0)
    wanted = gm(*inputs(row))
    torch.manual_seed(0)
    assert torch.equal(same(*inputs(row)), wanted)


@rows("leading")
def test_leading_tokens_are_all_that_a_head_needs(row: Row) -> None:
    gm = a_prefix_token(graph_of(row))
    dropped = drop_dead_tokens(gm)
    propagate_shapes(dropped, "drop_dead_tokens")
    check_outputs(gm, dropped)
    torch.testing.assert_close(dropped(*inputs(row)), gm(*inputs(row)))


def a_prefix_token(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` that returns the last prefix token alone, in every dimension that has some before its patches."""
    gm = copy_of(gm)
    result = result_of(gm)
    (output,) = result.users
    kind = infer_types(gm.graph).type(result)
    prefixes = {d: axis.prefix for d, dim in enumerate(kind) if (axis := token_axis(dim)) is not None and axis.prefix}
    with gm.graph.inserting_before(output):
        first = result
        for dim, prefix in reversed(prefixes.items()):
            first = call(gm.graph, aten.select.int, first, dim, prefix - 1, like=result)
    output.args = (first,)
    finish(gm)
    propagate_shapes(gm, "a head")
    return gm


def calls(gm: fx.GraphModule) -> list[Any]:
    """Operators on tensors: a product of sizes is not missed where -1 says the same."""
    return [node.target for node in gm.graph.nodes if not isinstance(node.meta.get("val"), int)]


def plan_of(gm: fx.GraphModule) -> Planned:
    counts = [LEAVE] + [0] * (len(typed_graph(gm.graph).blocks) - 1)
    options = Options.of(schedule=counts, strategy=STRATEGY)
    return make_plan(gm, options, Original(gm.graph, count_flops(gm.graph)), apply_plan_unverified)


def by_hand(row: Row, values: Mapping[fx.Node, Any]) -> Tensor:
    """The row's function on the tokens that a run has left behind its site. values: of the run's nodes."""
    (site,) = (node for node in values if SITE in node.meta)
    x, removal = values[site], site.meta[SITE][1].removal
    kept, gone = values[removal.kept], values[removal.removed]
    assert x.shape == (5, 2 + 12 - LEAVE, 8)
    assert len(set(map(tuple, kept.tolist()))) == 5, "other tokens stay in each image"
    old = stem(IMAGE, EMBED, CLS)
    named = {name: ({"old": old, "memory": old} | GIVEN)[name] for name in beside(row)}
    if row.reads != "left":
        shares = ops.recovery_weights(values[removal.weights], kept, gone, list(STEM.shape))
        whole = row.function(ops.recover(x, shares, kept, gone, 0, 1, 2, 0), **named)
        return whole if row.reads == "whole" else whole.gather(1, kept[..., None].expand(-1, -1, 8))
    if not any(TOKEN_DIMS[name] for name in named):
        return row.function(x, **named)
    results = []
    for image in range(5):
        tokens = torch.cat([torch.arange(2), 2 + kept[image]])
        its = {name: taken(name, value, image, tokens) for name, value in named.items()}
        results.append(row.function(x[image : image + 1], **its))
    return torch.cat(results)


def taken(name: str, value: Tensor, image: int, tokens: Tensor) -> Tensor:
    """Of what holds something for every token of every image (or of all alike): what it holds for these tokens."""
    value = value[image : image + 1] if name in ("old", "memory") else value
    for dim in TOKEN_DIMS[name]:
        value = value.index_select(dim, tokens)
    return value


@pytest.mark.parametrize("row", [pytest.param(row, marks=defect(row.wrong), id=str(row.operator)) for row in REFUSED])
def test_refused_behind_a_site(row: Refused) -> None:
    """Tokens can't be made up again where they are needed, so none may leave; with all there, nothing is asked."""
    gm = graph_of(row)
    with pytest.raises(UnsupportedModelError, match=row.refusal):
        plan_of(gm)
    assert row.reason in behind_the_site(gm).results[under_test(row.operator, gm)].barrier
    assert not find_coercions(infer_with_sites(gm.graph, frozenset())).refused


@pytest.mark.parametrize(
    ("cut", "typed"),
    [
        (lambda x: patch_pixels(x, 0, 2, 4, 3, 5, 1).reshape(x.shape[0], 12, 12), "B, m0, 12"),
        (lambda x: patch_pixels(x, 0, 2, 4, 3, 5, 1).reshape(x.shape[0], 4, 3, 12), "B, h0, h1, 12"),
        (lambda x: patch_pixels(x, 0, 4, 2, 3, 5, 1).reshape(x.shape[0], 12, 12), "B, 12, 12"),
        (lambda x: patch_pixels(x, 0, 2, 3, 4, 5, 1).reshape(x.shape[0], 12, 12), "B, 12, 12"),
        (lambda x: patch_pixels(x, 2, 4, 0, 3, 5, 1).reshape(12, x.shape[0], 12), "12, B, 12"),
        (lambda x: patch_pixels(x @ torch.ones(6, 6), 0, 2, 4, 3, 5, 1).reshape(x.shape[0], 12, 12), "B, 12, 12"),
        (lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12, 12), "B, m0, 12"),
        (lambda x: x.unfold(2, 2, 1).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 21, 12), "B, 21, 12"),
        (lambda x: patch_pixels(x, 2, 0, 4, 3, 5, 1).transpose(0, 1).reshape(-1, 12, 4, 3).flatten(2), "B, m0, 12"),
        (lambda x: x[:, 0].reshape(-1, 8, 3, 2).transpose(1, 2).reshape(-1, 3, 16), "B, m0, 16"),
        (lambda x: x.reshape(-1, 3, 1, 8, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 48), "B, m0, 48"),
        (lambda x: F.unfold(x, (8, 2), stride=(8, 2)).transpose(1, 2), "B, m0, 48"),
        (lambda x: strip(x).flatten(2).transpose(1, 2), "B, m0, 3"),
        (lambda x: strip(x).squeeze(2).transpose(1, 2), "B, m0, 3"),
        (lambda x: strip(x)[:, :, 0].permute(0, 2, 1), "B, m0, 3"),
        (lambda x: strip(x).mean(2).transpose(1, 2), "B, m0, 3"),
        (lambda x: strip(x).mean(2), "B, 3, h1"),
        (lambda x: torch.stack([in_a_row(x), in_a_row(x + 1)], 1).reshape(-1, 24, 3), "B, m0, 3"),
        (lambda x: torch.stack([in_a_row(x), in_a_row(x + 1)], 2).reshape(-1, 24, 3), "B, m0, 3"),
    ],
    ids=[
        "patches",
        "a grid of patches",
        "by columns",
        "rows of pixels",
        "before the batch",
        "a layer's windows",
        "Tensor.unfold",
        "overlapping",
        "in several views",
        "a series",
        "a strip",
        "F.unfold",
        "a strip in a row",
        "a strip squeezed",
        "a strip's only line",
        "a strip's mean line",
        "a map of one line",
        "two in a sequence",
        "two by turns",
    ],
)
def test_a_grid_is_born_where_views_cut_an_image(cut: Callable[[Tensor], Tensor], typed: str) -> None:
    gm = traced(cut, fake(IMAGE))
    assert spelled(infer_types(gm.graph).type(result_of(gm))) == typed


def in_a_row(image: Tensor) -> Tensor:
    return F.max_pool2d(image, 2).flatten(2).transpose(1, 2)


def strip(image: Tensor) -> Tensor:
    """A grid one patch high: [B, 3, 8, 6] -> [B, 3, 1, 3]."""
    return F.max_pool2d(image, (8, 2))


def patch_pixels(image: Tensor, *order: int) -> Tensor:
    """[B, 3, 4*2, 3*2], both sides split in two, in another order."""
    return image.reshape(image.shape[0], 3, 4, 2, 3, 2).permute(order)


# ---- what no operator that runs can bring about


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(NoRule, match="sizes 2 and 3 do not broadcast"):
        join(plain(2), plain(3))
    with pytest.raises(NoRule, match="2 and 3 can't be summed over together"):
        join_summed((Plain(2),), (Plain(3),))
    with pytest.raises(NoRule, match="no match"):
        regroup([Plain(2)], (2, 2))


def test_arguments_that_are_no_tensors() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = registry.Call(graph.call_function(operator.getitem, (x, 0)), {x: plain(2)})
    with pytest.raises(NoRule, match="argument 1 is not a tensor"):
        call.operand(1)
    with pytest.raises(NoRule, match="no list of tensors"):
        getitem(call)
    with pytest.raises(NoRule, match="x is not a single tensor"):
        registry.Call(call.node, {x: TypeList((plain(2),))}).type(0)


class LessItsCells(nn.Module):
    """A ViT of three layers from whose map of patches the mean of each cell of 2 x 2 is taken away first."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.kept, self.patches = kept, nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(3))

    def forward(self, image: Tensor) -> Tensor:
        cells = self.patches(image).permute(0, 2, 3, 1).unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
        mean = cells.mean((2, 4), keepdim=True) if self.kept else cells.mean((2, 4))[:, :, None, :, None]
        x_BNC = (cells - mean).flatten(3, 4).flatten(1, 3)
        for layer in self.layers:
            x_BNC = layer(x_BNC)
        return x_BNC.mean(1)


@pytest.mark.parametrize("kept", [True, False])
@torch.no_grad()
def test_a_mean_of_cells_that_meets_their_patches_again_is_of_the_same_grid(kept: bool) -> None:
    image = torch.randn(2, 3, 32, 32)
    fast = gtp_fx.optimize(LessItsCells(kept).eval(), flops_budget=0.8, example_inputs=image, compile=False)
    assert fast.report.sites and all(not row.windows for row in fast.report.sites)
