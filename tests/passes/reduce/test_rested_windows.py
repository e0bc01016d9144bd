"""Windows that rest, against the whole block by hand whose result is kept in the windows that are awake alone.

B images, maps of H x W patches, C channels. Windows are independent, so the two do the same float32 arithmetic on more
or fewer rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from gtp_fx.report.token_flow import token_flow
from gtp_fx.strategies import Regeneration

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
RESTING = {
    SWIN: {"layers.0.blocks.0": 2, "layers.0.blocks.1": 3},
    SWIN_V2: {"layers.0.blocks.0": 1, "layers.0.blocks.1": 4},
    MAXVIT: {"stages.0.blocks.0.attn_block": 5, "stages.0.blocks.0.attn_grid": 40},
    PADDED: {"layers.0.blocks.0": 2, "layers.0.blocks.1": 3},
    TORCHVISION: {"features.1.0": 3, "features.1.1": 1},
    SAM: {"blocks.0": 1, "blocks.1": 3},
}
"""How many windows rest in which block."""

Cells = Callable[[nn.Module, int, int], Tensor]


def shifted(block: Any, height: int, width: int) -> Tensor:
    """The window of each patch, [H, W], where windows are shifted."""
    size, shift = block.window_size, block.shift_size
    rows, columns = (torch.arange(n).roll(by) for n, by in ((height, shift[0]), (width, shift[1])))
    return (rows // size[0])[:, None] * -(-width // size[1]) + columns // size[1]


def padded_first(block: Any, height: int, width: int) -> Tensor:
    """The same where the map is padded before it is rolled."""
    size, shift = block.attn.window_size, block.attn.shift_size
    rows, columns = (
        torch.arange(n + -n % of).roll(by)[:n] // of for n, by, of in zip((height, width), shift, size, strict=True)
    )
    return rows[:, None] * -(-width // size[1]) + columns


def of_sam(block: Any, height: int, width: int) -> Tensor:
    """The same where windows aren't shifted."""
    size = block.window_size
    return (torch.arange(height) // size)[:, None] * -(-width // size) + torch.arange(width) // size


def of_maxvit(block: Any, height: int, width: int) -> Tensor:
    """The same where windows are side by side, or spread over the whole map."""
    size = block.partition_size
    if block.partition_block:
        return (torch.arange(height) // size[0])[:, None] * (width // size[1]) + torch.arange(width) // size[1]
    many = height // size[0], width // size[1]
    return (torch.arange(height) % many[0])[:, None] * many[1] + torch.arange(width) % many[1]


CELLS: dict[Family, Cells] = {MAXVIT: of_maxvit, TORCHVISION: padded_first, SAM: of_sam}


@contextmanager
def resting(model: nn.Module, counts: dict[str, int], cells: Cells) -> Iterator[nn.Module]:
    """The model, in whose blocks some windows of each image keep what they had; those with fewer patches never do."""

    def rested(block: nn.Module, inputs: tuple[Tensor], output: Tensor, count: int) -> Tensor:
        (x_BHWC,) = inputs
        cell_HW = cells(block, *x_BHWC.shape[1:3])
        cells_BNC = [x_BHWC[:, cell_HW == w] for w in range(int(cell_HW.max()) + 1)]
        activity = torch.stack([(x - x.mean(1, keepdim=True)).norm(dim=-1).mean(1) for x in cells_BNC], 1)
        activity[:, cell_HW.flatten().bincount() < cell_HW.flatten().bincount().max()] = torch.inf
        awake = torch.zeros_like(activity).scatter(1, activity.argsort(dim=1)[:, count:], 1.0)
        return torch.where(awake[:, cell_HW][..., None] > 0, output, x_BHWC)

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
    with resting(model, RESTING[family], CELLS.get(family, shifted)) as by_hand:
        wanted = by_hand(x)
    assert error(fast.graph_module(x), wanted) < 1e-5
    assert error(model(x), wanted) > 1e-3, "a schedule that changes nothing proves nothing"


@families(SAM, PADDED, by_default=(SAM,))
def test_what_sizes_decide_is_a_constant_of_the_graph(family: Family) -> None:
    """Blocks share tables that don't depend on how many windows rest; nothing but what attention runs on is padded."""
    gm = optimised(family, schedule=schedule(family), strategy=REST).graph_module
    reads = [str(n.target) for n in gm.graph.find_nodes(op="get_attr") if str(n.target).startswith(CONSTANT)]
    # Swin's second block is shifted, and takes its mask by the windows' numbers.
    assert (len(reads), len(set(reads))) == {SAM: (8, 6), PADDED: (10, 10)}[family]
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


def by_distance(oracle: Oracle) -> Oracle:
    """The parts of a block whose tokens are ranked by how far they are from the mean of their window's patches."""

    def parts(*call: Any) -> Parts:
        found = oracle(*call)
        rows_BWnC, patch_Wn1 = found.windows.of(found.stream_BNC), (found.windows.index_Wn >= 0)[..., None]
        mean_BW1C = (rows_BWnC * patch_Wn1).sum(2, keepdim=True) / patch_Wn1.sum(1, keepdim=True)
        return replace(found, score_BWn=(rows_BWnC - mean_BW1C).norm(dim=-1))

    return parts


@families(PVT, PADDED_SAM, HIERA, by_default=(PVT,))
@torch.no_grad()
def test_where_windows_cant_rest_tokens_skip_by_their_distance_from_the_mean(family: Family) -> None:
    """No attention is scored, or leaves the fused operator."""
    model, x = shared_model(family), family.inputs()
    blocks = {name: count and count - 1 for name, count in family.blocks.items()}
    fast = optimised(family, schedule=list(blocks.values()), strategy=REST)
    assert all(row.windows for row in fast.report.sites)
    targets = [str(node.target) for node in fast.graph_module.graph.nodes]
    assert not any("scores" in target for target in targets)
    wanted = ByHand(model, by_distance(family.oracle(model)), blocks, mean=0.5)(x)
    assert error(fast.graph_module(x), wanted) < 1e-5
    assert error(fast.graph_module(x), model(x)) > 1e-4, "a schedule that changes nothing proves nothing"


class Nobody:
    """What of a plan says that no window rests, at every block where some could."""

    def __init__(self, blocks: list[int]) -> None:
        self.resting = dict.fromkeys(blocks, 0)


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
    assert [view.layer for view in shown] == ["layers.1.blocks.0.attn"]


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
    made = optimised(SWIN, schedule=[1, 0, 0], strategy=REST)
    with pytest.raises(gtp_fx.OptionError, match="whole windows rest here"):
        token_flow(made.graph_module, made.sites, made.report.sites, SWIN.inputs(1))
    with pytest.raises(gtp_fx.OptionError, match=r"windows='sleep'.*'skip', 'rest'"):
        Regeneration(windows="sleep")


WIDTH, GRID, WINDOW = 16, 6, 3


class Windows(nn.Module):
    """A map [B, 6, 6, C] whose one block attends in windows of 3 x 3.

    across: what else it does, which windows see. apart: whether windows are a dimension beside images.
    """

    def __init__(self, across: str = "", apart: bool = False) -> None:
        super().__init__()
        self.across, self.lead = across, (-1, 4) if apart else (-1,)
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.place = nn.Parameter(torch.randn(1, GRID, GRID, WIDTH))
        self.of_window = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, image: Tensor) -> Any:
        x_BHWC = self.patches(image).permute(0, 2, 3, 1)
        y = self.norm1(x_BHWC)
        if self.across == "places":
            y = y + self.place
        if self.across == "mean":
            y = y - y.mean((1, 2), keepdim=True)
        y = (
            y.unflatten(1, (-1, WINDOW))
            .unflatten(3, (-1, WINDOW))
            .transpose(2, 3)
            .reshape(*self.lead, WINDOW**2, WIDTH)
        )
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(-3, -2) for t in self.qkv(y).chunk(3, -1))
        if self.across == "table":
            q = q * self.of_window[:, None] if len(self.lead) > 1 else q * self.of_window.repeat(len(q) // 4, 1, 1, 1)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))
        y = y.view(-1, 2, 2, WINDOW, WINDOW, WIDTH).transpose(2, 3).reshape(x_BHWC.shape)
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


def by_hand(net: Windows, x_BHWC: Tensor) -> Tensor:
    """What the net makes of patches where its third window rests."""
    ends = []
    for row, column in ((0, 0), (0, 3), (3, 3)):
        x = x_BHWC[:, row : row + 3, column : column + 3].flatten(1, 2)
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in net.qkv(net.norm1(x)).chunk(3, -1))
        x = x + net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        ends.append(x + net.down(F.gelu(net.up(net.norm2(x)))))
    return torch.cat([*ends, x_BHWC[:, 3:, :3].flatten(1, 2)], 1).mean(1)
