"""Windows that rest, against the whole block by hand whose result is kept in the windows that are awake alone.

B images, maps of H x W patches, C channels. Windows are independent, so the two do the same float32 arithmetic on more
or fewer rows.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gtp_fx
from bench.dynamo_door import Door
from gtp_fx.analysis.resting import Rest
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph.edit import CONSTANT
from gtp_fx.passes.reduce.rest_windows import rest_windows
from gtp_fx.report.token_flow import RestView, token_flow
from gtp_fx.strategies import Regeneration, Semantic

from support import reference_windows
from support.captured import optimised, shared_model
from support.plain_vit import built
from support.printed import in_one_line
from support.reference_windows import ByHand, Oracle, Parts
from support.window_families import FAMILIES, PADDED, SWIN, TORCHVISION, Family, families, samvit
from support.window_families import SAM as PADDED_SAM
from support.window_graphs import error, marked

REST = Regeneration(windows="rest")
SWIN_V2, MAXVIT, HIERA, PVT = (
    next(family for family in FAMILIES if family.name == name) for name in ("swin v2", "maxvit", "hiera", "pvt v2")
)
SAM = samvit("samvit of nine windows", (256, 320), {"blocks.0": 24, "blocks.1": 20}, global_blocks=())
BESIDE = samvit("samvit of nine windows, then global", (256, 320), {"blocks.0": 24, "blocks.1": 70}, global_blocks=(1,))
RESTING = {
    SWIN: {"layers.0.blocks.0": 2, "layers.0.blocks.1": 3},
    SWIN_V2: {"layers.0.blocks.0": 1, "layers.0.blocks.1": 4},
    MAXVIT: {"stages.0.blocks.0.attn_block": 5, "stages.0.blocks.0.attn_grid": 40},
    PADDED: {"layers.0.blocks.0": 2, "layers.0.blocks.1": 3},
    TORCHVISION: {"features.1.0": 3, "features.1.1": 1},
    SAM: {"blocks.0": 1, "blocks.1": 3},
}
"""How many windows rest in which block."""

SHARE = REST.rest_share


def parted(side: int) -> list[list[int]]:
    """The places of each cell along a side: its halves, the first one the longer, in parts of at most four.

    A side of three or fewer is one cell.
    """
    if side < 4:
        return [list(range(side))]
    halves = [list(range(side - side // 2)), list(range(side - side // 2, side))]
    many = -(-len(halves[0]) // 4)
    return [part.tolist() for half in halves for part in torch.tensor(half).tensor_split(many)]


def cells_of(sides: tuple[int, int]) -> list[list[int]]:
    """The places of each cell of a window, row by row."""
    height, width = sides
    return [[r * width + c for r in rows for c in columns] for rows in parted(height) for columns in parted(width)]


def middle(cell: list[int], width: int) -> int:
    rows, columns = sorted({place // width for place in cell}), sorted({place % width for place in cell})
    return rows[len(rows) // 2] * width + columns[len(columns) // 2]


def attend_by_cells(
    sides: tuple[int, int],
    of_patches: tuple[Tensor, Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Any,
    bias: Any = 0.0,
) -> tuple[Tensor, Tensor]:
    """`reference_windows.attend` where all tokens of a cell are the same: [B, W, H, n, D] -> [B, W, n, C].

    One query of each cell, at its middle, asks one key of each, which counts as often as the cell has places.

    of_patches: keys and values of the patches, which it asks instead where there are some.
    """
    cells = cells_of(sides)
    at = torch.tensor([middle(cell, sides[1]) for cell in cells])
    if isinstance(bias, Tensor):
        bias = bias[..., at, :]
    if of_patches is None:
        bias = bias[..., at] if isinstance(bias, Tensor) else bias
        bias = bias + torch.tensor([float(len(cell)) for cell in cells]).log()
        k, v = k[..., at, :], v[..., at, :]
    else:
        k, v = of_patches
    logits = q[..., at, :] @ k.transpose(-2, -1) * scale + bias
    made_BWHGD = logits.softmax(dim=-1) @ v
    cell_n = torch.empty(q.shape[-2], dtype=torch.long)
    for number, cell in enumerate(cells):
        cell_n[cell] = number
    return made_BWHGD[..., cell_n, :].transpose(2, 3).flatten(3), q.new_zeros(*q.shape[:2], q.shape[3])


@contextmanager
def resting(
    model: nn.Module,
    oracle: Oracle,
    counts: dict[str, int],
    seen: dict[str, Tensor] | None = None,
    share: float = SHARE,
    to_patches: bool = False,
) -> Iterator[nn.Module]:
    """The model, in some of whose blocks windows of each image rest; those with padding never do.

    seen: gets which tokens are awake, [B, N], by the block's name. to_patches: cells ask patches instead of cells.
    A token of these gets a share of what the block changes where each token is the mean of its cell.
    """

    def rested(block: nn.Module, inputs: tuple[Tensor], output: Tensor, count: int) -> Tensor:
        (x_BHWC,) = inputs
        x_BNC = x_BHWC.flatten(1, -2)
        attend, of_patches = reference_windows.attend, []

        def recorded(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
            of_patches.append((k, v))
            return attend(q, k, v, *others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference_windows, "attend", recorded)
            windows = oracle(block, x_BHWC).windows
        padded_W = (windows.index_Wn < 0).any(dim=1)
        rows_BWnC = windows.of(x_BNC)
        activity = (rows_BWnC - rows_BWnC.mean(2, keepdim=True)).norm(dim=-1).mean(2)
        activity[:, padded_W] = torch.inf
        awake = torch.zeros_like(activity).scatter(1, activity.argsort(dim=1)[:, count:], 1.0)
        awake_BNC = windows.back(awake[..., None, None].expand_as(rows_BWnC)).reshape(x_BHWC.shape)
        square = math.isqrt(rows_BWnC.shape[2])
        sides = getattr(block, "partition_size", (square, square))
        if seen is not None:
            seen[next(name for name, module in model.named_modules() if module is block)] = awake_BNC[..., 0].flatten(1)
        means_BWnC = rows_BWnC.clone()
        for cell in cells_of(sides):
            means_BWnC[:, :, cell] = rows_BWnC[:, :, cell].mean(dim=2, keepdim=True)
        means_BHWC = windows.back(means_BWnC).reshape(x_BHWC.shape)
        with pytest.MonkeyPatch.context() as patch:
            asked = of_patches[0] if to_patches else None
            patch.setattr(reference_windows, "attend", partial(attend_by_cells, sides, asked))
            parts = oracle(block, means_BHWC)
        added_BNC = torch.stack([parts.branch(x) for x in parts.stream_BNC])
        change = parts.whole(parts.stream_BNC + added_BNC) - means_BHWC
        return torch.where(awake_BNC > 0, output, x_BHWC + share * change)

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, x, y, count=count: rested(m, x, y, count))
        for name, count in counts.items()
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def schedule(family: Family) -> list[int]:
    return [RESTING[family].get(name, 0) for name in family.blocks]


@families(*RESTING, by_default=(SWIN, SAM))
@torch.no_grad()
def test_equals_the_blocks_by_hand(family: Family) -> None:
    """Shifted windows with masks, relative positions and a batch other than the captured one among them."""
    model, x = shared_model(family), family.inputs(batch=3)
    fast = optimised(family, schedule=schedule(family), strategy=REST)
    with resting(model, family.oracle(model), RESTING[family]) as by_hand:
        wanted = by_hand(x)
    assert error(fast.graph_module(x), wanted) < 1e-5
    assert error(model(x), wanted) > 1e-3, "a schedule that changes nothing proves nothing"


@families(*RESTING, by_default=(SWIN, SAM))
def test_windows_that_are_awake_and_cells_share_their_products(family: Family) -> None:
    """So a block that rests has no more products than it had: each layer runs once, for all rows."""
    fast = optimised(family, schedule=schedule(family), strategy=REST)
    read = Counter(n.args[1] for n in fast.graph_module.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert set(read.values()) == {1}


TO_PATCHES = tuple(family for family in RESTING if family is not SAM)


@families(*TO_PATCHES, by_default=(SWIN,))
@torch.no_grad()
def test_semantic_tokens_of_a_window_attend_to_all_of_its_patches(family: Family) -> None:
    """By hand as above. FLOPs are those that were priced, or `optimised` would fail."""
    model, x = shared_model(family), family.inputs(batch=3)
    fast = optimised(family, schedule=schedule(family), strategy=Semantic())
    with resting(model, family.oracle(model), RESTING[family], share=1.0, to_patches=True) as by_hand:
        wanted = by_hand(x)
    assert error(fast.graph_module(x), wanted) < 1e-5
    among_cells = optimised(family, schedule=schedule(family), strategy=replace(REST, rest_share=1.0))
    assert among_cells.report.flops_ratio < fast.report.flops_ratio < 1
    assert error(among_cells.graph_module(x), wanted) > 1e-4


@pytest.mark.xdist_group(SAM.name)
def test_a_bias_that_is_computed_from_queries_keeps_semantic_tokens_out() -> None:
    with pytest.raises(gtp_fx.UnsupportedModelError, match="the bias of its attention is computed from its tokens"):
        optimised(SAM, flops_budget=0.9, strategy=Semantic())


@families(SAM, PADDED, by_default=(SAM,))
def test_what_sizes_decide_is_a_constant_of_the_graph(family: Family) -> None:
    """Blocks share tables that don't depend on how many windows rest; nothing but what attention runs on is padded."""
    gm = optimised(family, schedule=schedule(family), strategy=REST).graph_module
    reads = [str(n.target) for n in gm.graph.find_nodes(op="get_attr") if str(n.target).startswith(CONSTANT)]
    # Swin's second block is shifted, and takes its mask by the windows' numbers.
    assert (len(reads), len(set(reads))) == {SAM: (24, 12), PADDED: (26, 18)}[family]
    assert not any(n.target is torch.ops.aten.constant_pad_nd.default for n in gm.graph.nodes)


@pytest.mark.nightly
@pytest.mark.xdist_group(SAM.name)
@torch.no_grad()
def test_tables_have_numbers_where_the_model_gets_its_own_later() -> None:
    model, x = shared_model(SAM), SAM.inputs(batch=3)
    wanted = optimised(SAM, schedule=schedule(SAM), strategy=REST).graph_module(x)
    without = copy.deepcopy(model).to("meta")
    fast = gtp_fx.optimize(
        without, schedule=schedule(SAM), strategy=REST, example_inputs=SAM.inputs().to("meta"), compile=False
    )
    fast.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert error(fast(x), wanted) < 1e-5


@families(*RESTING, by_default=(SAM,))
@torch.no_grad()
def test_one_image_captured_by_dynamo_rests_as_any_batch_does(family: Family) -> None:
    """Its batch is a number there, a dimension of size one or none. What skips after windows that rest still does."""
    counts = schedule(family)
    if family is SWIN:
        counts[-1] = 23
    door = Door(schedule=counts, strategy=REST)
    torch._dynamo.reset()
    x = family.inputs(batch=1)
    found = torch.compile(shared_model(family), backend=door, fullgraph=True)(x)
    fast = optimised(family, schedule=counts, strategy=REST)
    assert door.made[0].report.sites == fast.report.sites
    assert error(found, fast.graph_module(x)) < 1e-6


def by_distance(oracle: Oracle) -> Oracle:
    """The parts of a block whose tokens are ranked by how far they are from the mean of their window's patches."""

    def parts(*call: Any) -> Parts:
        found = oracle(*call)
        rows_BWnC, patch_Wn1 = found.windows.of(found.stream_BNC), (found.windows.index_Wn >= 0)[..., None]
        mean_BW1C = (rows_BWnC * patch_Wn1).sum(2, keepdim=True) / patch_Wn1.sum(1, keepdim=True)
        return replace(found, score_BWn=(rows_BWnC - mean_BW1C).norm(dim=-1))

    return parts


@families(BESIDE, SWIN, by_default=(SWIN,))
@torch.no_grad()
def test_beside_windows_that_may_rest_tokens_skip_by_their_distance_from_the_mean(family: Family) -> None:
    """Where a block attends over its whole grid. No attention is scored, or leaves the fused operator."""
    model, x = shared_model(family), family.inputs()
    last = family.branched[-1]
    blocks = {name: family.blocks[name] - 1 if name == last else 0 for name in family.blocks}
    fast = optimised(family, schedule=list(blocks.values()), strategy=REST)
    assert [row.layer for row in fast.report.sites] == [f"{last}.attn"] and fast.report.sites[0].windows
    assert not _scores(fast.graph_module)
    wanted = ByHand(model, by_distance(family.oracle(model)), {last: blocks[last]}, mean=0.5)(x)
    assert error(fast.graph_module(x), wanted) < 1e-5
    assert error(fast.graph_module(x), model(x)) > 1e-4, "a schedule that changes nothing proves nothing"


@families(PVT, PADDED_SAM, HIERA, by_default=(PVT,))
@torch.no_grad()
def test_where_no_windows_can_rest_tokens_skip_by_attention(family: Family) -> None:
    """As with windows="skip": what a token tells decides where nothing is won by leaving attention as it is."""
    counts = [count and count - 1 for count in family.schedule]
    resting, skipping = (optimised(family, schedule=counts, strategy=s) for s in (REST, replace(REST, windows="skip")))
    assert all(row.windows for row in resting.report.sites) and _scores(resting.graph_module)
    assert torch.equal(resting.graph_module(family.inputs()), skipping.graph_module(family.inputs()))


def _scores(gm: torch.fx.GraphModule) -> list[str]:
    """The operators of a graph that score tokens."""
    return [str(node.target) for node in gm.graph.nodes if "scores" in str(node.target)]


class Nobody:
    """What of a plan says that no window rests, at every block where some could."""

    def __init__(self, blocks: list[int]) -> None:
        self.resting, self.strategy = dict.fromkeys(blocks, 0), REST


@families(*RESTING, by_default=(SWIN, SAM))
@torch.no_grad()
def test_where_no_window_rests_the_numbers_are_the_models(family: Family) -> None:
    gm, x = marked(family), family.inputs(batch=3)
    able = [number for number, rest in typed_graph(gm.graph).rests.items() if isinstance(rest, Rest)]
    assert len(able) == len(RESTING[family])
    plan: Any = Nobody(able)
    whole = rest_windows(gm, plan)
    assert sum(n.target is torch.ops.gtp_fx.window_activity.default for n in whole.graph.nodes) == len(able)
    assert error(whole(x), shared_model(family)(x)) < 1e-6


@pytest.mark.xdist_group(SWIN.name)
@torch.no_grad()
def test_both_doors_and_the_report() -> None:
    """Windows rest where they can; where all but one are padded the report says so, and tokens skip the MLP."""
    model, x = shared_model(SWIN), SWIN.inputs()
    fast = optimised(SWIN, flops_budget=0.7, strategy=REST)
    report = fast.report
    assert report.flops_ratio <= 0.7
    assert [(row.window_tokens, row.windows) for row in report.sites] == [(49, 0), (49, 0), (0, 2)]
    assert "target cpu; skip" not in in_one_line(str(report)) and "windows rest at 2 of 3" in in_one_line(str(report))
    (refusal,) = report.refusals
    assert (
        refusal.layer == "layers.1.blocks.0.attn"
        and "can't rest" in refusal.reason
        and "only 1 of its windows" in refusal.reason
    )
    door = Door(flops_budget=0.7, strategy=REST)
    torch._dynamo.reset()
    assert error(torch.compile(model, backend=door)(x), fast.graph_module(x)) < 1e-5
    assert door.made[0].report.sites == report.sites
    shown = token_flow(fast.graph_module, fast.sites, report.sites, x[:1])
    assert [view.layer for view in shown] == [
        f"layers.{name}.attn" for name in ("0.blocks.0", "0.blocks.1", "1.blocks.0")
    ]


@families(SWIN, SAM, by_default=(SWIN,))
@torch.no_grad()
def test_a_picture_shows_the_cells_of_windows_that_rest(family: Family) -> None:
    """On the image's own grid, also where windows are shifted."""
    model, x = shared_model(family), family.inputs()
    fast = optimised(family, schedule=schedule(family), strategy=REST)
    shown = [token_flow(fast.graph_module, fast.sites, fast.report.sites, image[None]) for image in x]
    seen: dict[str, Tensor] = {}
    with resting(model, family.oracle(model), RESTING[family], seen=seen):
        model(x)
    for views in zip(*shown, strict=True):
        wanted = seen[views[0].layer.removesuffix(".attn")]
        for view, awake in zip(views, wanted, strict=True):
            assert isinstance(view, RestView) and torch.equal(view.cells >= 0, awake == 0), view.layer
            # Each cell's patches lie together, but for what wraps round.
            assert len(view.cells.unique()) - 1 == int((awake == 0).sum()) * 4 // 49


@pytest.mark.xdist_group(SWIN.name)
def test_time_is_a_budget_as_well() -> None:
    made = optimised(SWIN, latency_budget=0.9, strategy=REST)
    assert made.report.seconds is not None
    before, after = made.report.seconds
    assert after <= 0.9 * before and any(row.window_tokens for row in made.report.sites)


@pytest.mark.xdist_group(SWIN.name)
def test_refusals_of_counts_and_names() -> None:
    with pytest.raises(gtp_fx.ScheduleError, match="lets 6 windows rest by block 1, of 6"):
        optimised(SWIN, schedule=[0, 6, 0], strategy=REST)
    made = optimised(SWIN, schedule=[1, 0, 0], strategy=replace(REST, rest_share=0.0))
    with pytest.raises(gtp_fx.OptionError, match=r"windows rest here without their cells \(rest_share=0\)"):
        token_flow(made.graph_module, made.sites, made.report.sites, SWIN.inputs(1))
    with pytest.raises(gtp_fx.OptionError, match=r"windows='sleep'.*'skip', 'rest'"):
        Regeneration(windows="sleep")


WIDTH, GRID = 16, 6


class Windows(nn.Module):
    """A map [B, 6, 6, C] whose one block attends in windows of 3 x 3, or of another side on a map of two of them.

    across: what else it does, which windows see. apart: whether windows are a dimension beside images.
    """

    def __init__(self, across: str = "", apart: bool = False, side: int = 3) -> None:
        super().__init__()
        self.across, self.lead, self.side = across, (-1, 4) if apart else (-1,), side
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.place = nn.Parameter(torch.randn(1, GRID, GRID, WIDTH))
        self.of_window = nn.Parameter(torch.randn(4, 1, 1))

    def placed(self, q: Tensor) -> Tensor:
        """Queries, [windows, heads, places, features], as attention gets them."""
        return q

    def forward(self, image: Tensor) -> Any:
        x_BHWC = self.patches(image).permute(0, 2, 3, 1)
        y = self.norm1(x_BHWC)
        if self.across == "places":
            y = y + self.place
        if self.across == "mean":
            y = y - y.mean((1, 2), keepdim=True)
        y = (
            y.unflatten(1, (-1, self.side))
            .unflatten(3, (-1, self.side))
            .transpose(2, 3)
            .reshape(*self.lead, self.side**2, WIDTH)
        )
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(-3, -2) for t in self.qkv(y).chunk(3, -1))
        if self.across == "table":
            q = q * self.of_window[:, None] if len(self.lead) > 1 else q * self.of_window.repeat(len(q) // 4, 1, 1, 1)
        y = self.out(F.scaled_dot_product_attention(self.placed(q), k, v).transpose(-3, -2).flatten(-2))
        y = y.view(-1, 2, 2, self.side, self.side, WIDTH).transpose(2, 3).reshape(x_BHWC.shape)
        between = x_BHWC + y
        x = between + self.down(F.gelu(self.up(self.norm2(between))))
        return (x.mean((1, 2)), between) if self.across == "returned" else x.mean((1, 2))


@pytest.mark.parametrize(
    ("across", "apart", "reason"),
    [
        ("places", False, "add.Tensor inside it isn't token-wise"),
        ("mean", False, "mean.dim inside it"),
        ("table", True, "reads a table by window that fewer windows can't be taken from"),
        ("returned", False, "add.Tensor inside it is read elsewhere"),
    ],
)
def test_what_windows_can_see_of_each_other_is_named(across: str, apart: bool, reason: str) -> None:
    net = built(lambda: Windows(across, apart))
    image = torch.randn(2, 3, 4 * GRID, 4 * GRID)
    made = gtp_fx.optimize(net, schedule=[2], strategy=REST, example_inputs=image, compile=False)
    assert [(row.windows, row.window_tokens) for row in made.report.sites] == [(4, 0)]
    (refusal,) = made.report.refusals
    assert reason in refusal.reason, refusal.reason


@pytest.mark.parametrize("apart", [False, True])
@torch.no_grad()
def test_a_window_of_equal_tokens_is_the_one_that_rests(apart: bool) -> None:
    net = built(lambda: Windows(apart=apart)).eval()
    image = torch.randn(2, 3, 4 * GRID, 4 * GRID)
    fast = gtp_fx.optimize(net, schedule=[1], strategy=REST, example_inputs=image, compile=False)
    rested = image.clone()
    rested[:, :, 12:, :12] *= 0.01  # and so its tokens are all but equal
    x_BHWC = net.patches(rested).permute(0, 2, 3, 1)
    wanted = by_hand(net, x_BHWC)
    assert [row.window_tokens for row in fast.report.sites] == [9]
    assert error(fast(rested), wanted) < 1e-5
    assert error(net(rested), wanted) > 1e-3


@torch.no_grad()
def test_a_window_of_equal_tokens_gets_what_the_original_gives_it() -> None:
    """Where its cells get all of their change: attention among tokens that are the same reads any one of them."""
    net = built(Windows).eval()
    image = torch.randn(2, 3, 4 * GRID, 4 * GRID)
    image[:, :, 12:, :12] = torch.randn(2, 3, 1, 1)
    whole, part, none = (
        gtp_fx.optimize(
            net, schedule=[1], strategy=replace(REST, rest_share=share), example_inputs=image, compile=False
        )
        for share in (1.0, 0.85, 0.0)
    )
    assert error(whole(image), net(image)) < 1e-5
    assert error(part(image), net(image)) > 1e-3 and error(none(image), net(image)) > 1e-3
    assert none.report.flops_ratio < whole.report.flops_ratio == part.report.flops_ratio < 1


class Placed(Windows):
    """Attends in windows of 4 x 4 whose queries are scaled by their place, or are mixed with those of other places."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__(side=4)
        self.mixed, self.of_place = mixed, nn.Parameter(torch.rand(16, 1) + 0.5)

    def placed(self, q: Tensor) -> Tensor:
        return q.softmax(dim=2) if self.mixed else q * self.of_place


@torch.no_grad()
def test_a_table_with_a_row_for_each_place_is_read_in_the_middle_of_cells() -> None:
    net = built(Placed).eval()
    image = torch.randn(2, 3, 4 * 8, 4 * 8)
    image[:, :, 16:, :16] *= 0.3
    fast = gtp_fx.optimize(net, schedule=[1], strategy=REST, example_inputs=image, compile=False)
    assert [row.window_tokens for row in fast.report.sites] == [16]
    wanted = by_hand(net, net.patches(image).permute(0, 2, 3, 1))
    assert error(fast(image), wanted) < 1e-5
    net.of_place.data[5] += 1.0  # the middle of the first cell
    assert error(fast(image), wanted) > 1e-4


def test_what_needs_every_place_of_a_window_is_named() -> None:
    net = built(lambda: Placed(mixed=True))
    made = gtp_fx.optimize(net, schedule=[2], strategy=REST, example_inputs=torch.randn(2, 3, 32, 32), compile=False)
    (refusal,) = made.report.refusals
    assert "softmax.int inside it works across the places of a window" in refusal.reason, refusal.reason


def by_hand(net: Windows, x_BHWC: Tensor) -> Tensor:
    """What the net makes of patches where its third window rests."""
    ends, side = [], net.side
    cells = cells_of((side, side))
    for row, column in ((0, 0), (0, side), (side, side), (side, 0)):
        before = x = x_BHWC[:, row : row + side, column : column + side].flatten(1, 2)
        places = list(range(side**2))
        if (row, column) == (side, 0):
            x, places = torch.stack([x[:, cell].mean(1) for cell in cells], 1), [middle(cell, side) for cell in cells]
        entered = x
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in net.qkv(net.norm1(x)).chunk(3, -1))
        q = q * net.of_place[places] if isinstance(net, Placed) else q
        x = x + net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + net.down(F.gelu(net.up(net.norm2(x))))
        if len(places) < side**2:
            change, x = x - entered, before.clone()
            for number, cell in enumerate(cells):
                x[:, cell] += SHARE * change[:, number, None]
        ends.append(x)
    return torch.cat(ends, 1).mean(1)
