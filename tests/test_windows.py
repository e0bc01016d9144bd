"""Branch placement against the same by hand, on families whose blocks attend within windows, or to pooled keys.

Grids are no squares wherever the library takes that. Every block of a model that can has tokens skip its branch, so that
a block sees what those before it made of theirs. Tolerance: the two do the same float32 arithmetic in another order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.models.nest import Nest
from torch import Tensor, fx, nn
from torchvision.models.swin_transformer import SwinTransformer

import gtp_fx
from bench.dynamo_door import Door
from bench.live_weights import enliven
from gtp_fx.analysis.blocks import read_blocks
from gtp_fx.analysis.branches import Branch
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.drop_trivial_masks import drop_trivial_masks
from gtp_fx.passes.exact.einsum_to_matmul import einsum_to_matmul
from gtp_fx.passes.exact.fuse_attention import fuse_attention
from gtp_fx.passes.exact.mark_blocks import mark_blocks
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.passes.reduce.skip_branches import skip_branches
from gtp_fx.report.draw_token_flow import draw_journeys
from gtp_fx.report.token_flow import SkipView, journeys
from gtp_fx.types.axes import Plain, TensorType
from gtp_fx.types.infer import infer_types
from gtp_fx.types.layouts import by_window, convert, image_layout

import reference_windows as oracles
from reference import select
from reference_windows import ByHand, Oracle, Parts


@dataclass(frozen=True, eq=False)
class Family:
    """blocks: by the name of each attention block's module, in graph order, tokens of each window that skip its branch.

    oracle: of the model, what takes a block's call to its parts. shape: of an image.
    """

    name: str
    build: Callable[[], nn.Module]
    oracle: Callable[[nn.Module], Oracle]
    blocks: dict[str, int]
    shape: tuple[int, ...]

    @property
    def branched(self) -> list[str]:
        """The blocks that have a branch to skip: all but those after which tokens leave the stream."""
        return [name for name, count in self.blocks.items() if count]

    @property
    def schedule(self) -> list[int]:
        return list(self.blocks.values())

    def inputs(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0))

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return enliven(self.build()).eval()


def family(
    name: str, oracle: Oracle, make: Callable[..., nn.Module], size: tuple[int, int], blocks: dict[str, int], **kw: Any
) -> Family:
    return Family(name, partial(make, **kw), lambda _: oracle, blocks, (3, *size))


def from_timm(arch: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, arch, num_classes=10, **kwargs)


def from_hf(name: str, **config: Any) -> Callable[[], nn.Module]:
    of_class = getattr(transformers, name)
    return lambda: of_class(of_class.config_class(**config))


RECOVER = gtp_fx.GTP(branch="recover")
ONE: dict[str, Any] = {"depths": (2,), "num_heads": (2,), "embed_dim": 32}
PLAIN: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "window_size": 7}

SWIN = family(
    "swin",
    oracles.swin,
    from_timm("swin_tiny_patch4_window7_224", img_size=(56, 84), depths=(2, 1), num_heads=(2, 4), embed_dim=32),
    (56, 84),
    {"layers.0.blocks.0": 20, "layers.0.blocks.1": 26, "layers.1.blocks.0": 44},
)
SAM = family(
    "samvit",
    oracles.sam,
    from_timm(
        "samvit_base_patch16",
        img_size=(160, 192),
        depth=2,
        embed_dim=64,
        num_heads=2,
        window_size=7,
        global_attn_indexes=(1,),
    ),
    (160, 192),
    {"blocks.0": 24, "blocks.1": 70},
)
PADDED = family(
    "swin rolled, then padded",
    oracles.swin,
    from_timm(
        "swin_tiny_patch4_window7_224",
        img_size=(64, 80),
        window_size=7,
        strict_img_size=False,
        always_partition=True,
        **ONE,
    ),
    (64, 80),
    {"layers.0.blocks.0": 20, "layers.0.blocks.1": 30},
)
TORCHVISION = family(
    "torchvision swin, padded, then rolled",
    oracles.swin_torchvision,
    partial(SwinTransformer, [4, 4], 32, [2], [2], [7, 7], num_classes=10),
    (64, 80),
    {"features.1.0": 20, "features.1.1": 30},
)
HF_SWIN = family(
    "transformers swin, padded, then rolled",
    oracles.swin_hf,
    from_hf(
        "SwinForImageClassification",
        image_size=[64, 80],
        depths=[2],
        num_heads=[2],
        embed_dim=32,
        window_size=7,
        num_labels=10,
    ),
    (64, 80),
    {"swin.encoder.layers.0.blocks.0": 20, "swin.encoder.layers.0.blocks.1": 30},
)
HIERA = Family(
    "hiera",
    from_timm("hiera_tiny_224", img_size=(64, 96), stages=(2, 2, 2, 1), embed_dim=32, num_heads=1),
    oracles.hiera,
    {"blocks.0": 30, "blocks.1": 20, "blocks.3": 7, "blocks.5": 9},
    (3, 64, 96),
)
TWINS = family(
    "twins",
    oracles.twins,
    from_timm(
        "twins_svt_small",
        img_size=(64, 96),
        wss=(7,) * 4,
        depths=(2, 1, 1, 1),
        embed_dims=(32,) * 4,
        num_heads=(2,) * 4,
    ),
    (64, 96),
    {"blocks.0.0": 25, "blocks.0.1": 200, "blocks.1.0": 20, "blocks.2.0": 20, "blocks.3.0": 22},
)
FAMILIES = (
    SWIN,
    PADDED,
    family(
        "swin v2",
        oracles.swin_v2,
        from_timm("swinv2_tiny_window8_256", img_size=(64, 96), **ONE),
        (64, 96),
        {"layers.0.blocks.0": 30, "layers.0.blocks.1": 25},
    ),
    TORCHVISION,
    HF_SWIN,
    SAM,
    family(
        "transformers SAM",
        oracles.sam,
        from_hf(
            "SamVisionModel",
            **PLAIN,
            image_size=160,
            patch_size=16,
            global_attn_indexes=[1],
            output_channels=32,
            mlp_dim=128,
        ),
        (160, 160),
        {"vision_encoder.layers.0": 24, "vision_encoder.layers.1": 50},
    ),
    family(
        "transformers ViTDet",
        oracles.vitdet,
        from_hf(
            "VitDetModel",
            **PLAIN,
            image_size=[160, 192],
            pretrain_image_size=160,
            window_block_indices=[0],
            mlp_ratio=2,
        ),
        (160, 192),
        {"encoder.layer.0": 24, "encoder.layer.1": 70},
    ),
    family(
        "maxvit",
        oracles.maxvit,
        from_timm("maxvit_tiny_tf_224", img_size=(96, 128), depths=(1,), embed_dim=(64,), stem_width=32),
        (96, 128),
        {"stages.0.blocks.0.attn_block": 2, "stages.0.blocks.0.attn_grid": 4},
    ),
    HIERA,
    TWINS,
    family(
        "nest",
        oracles.nest,
        partial(Nest, img_size=64, num_levels=2, embed_dims=(32, 64), num_heads=(2, 4), depths=(1, 1), num_classes=10),
        (64, 64),
        {"levels.0.transformer_encoder.0": 30, "levels.1.transformer_encoder.0": 20},
    ),
    family(
        "pvt v2",
        oracles.pvt,
        from_timm("pvt_v2_b0", depths=(1, 1, 1, 1)),
        (96, 128),
        {"stages.0.blocks.0": 300, "stages.1.blocks.0": 60, "stages.2.blocks.0": 12, "stages.3.blocks.0": 0},
    ),
)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def tensors(output: Any) -> list[Tensor]:
    leaves = [output] if isinstance(output, Tensor) else list(output.values())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def error(found: Any, wanted: Any) -> float:
    """Largest error over largest value, of the output that is furthest off."""
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    assert pairs and all(a.shape == b.shape for a, b in pairs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def on(family: Family, model: nn.Module, blocks: dict[str, int], idle: bool = False) -> ByHand:
    return ByHand(model, family.oracle(model), blocks, idle)


@every_family
@torch.no_grad()
def test_blocks_by_hand_where_no_token_skips_are_the_model(family: Family) -> None:
    model, x = family.model(), family.inputs()
    assert error(on(family, model, dict.fromkeys(family.blocks, 0))(x), model(x)) < 1e-5


@every_family
@torch.no_grad()
def test_equals_the_branch_by_hand(family: Family) -> None:
    check(family)


def check(family: Family) -> None:
    """On another batch than it was captured with."""
    model, x = family.model(), family.inputs(batch=3)
    fast = gtp_fx.optimize(
        model, schedule=family.schedule, strategy=RECOVER, example_inputs=family.inputs(), compile=False
    )
    assert [row.propagated for row in fast.report.sites] == [n for n in family.schedule if n]
    assert all(row.windows for row in fast.report.sites)
    wanted = on(family, model, family.blocks)(x)
    assert error(fast(x), wanted) < 1e-5
    assert error(model(x), wanted) > 1e-4, "a schedule that changes nothing proves nothing"


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        pytest.param(TORCHVISION, {"features.1.1": 40}),
        pytest.param(PADDED, {"layers.0.blocks.1": 41}),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else "",
)
@torch.no_grad()
def test_padding_is_nobodys_neighbour(family: Family, blocks: dict[str, int]) -> None:
    check(replace(family, blocks={**dict.fromkeys(family.blocks, 0), **blocks}))


@torch.no_grad()
@pytest.mark.parametrize("family", [SWIN, SAM], ids=lambda family: family.name)
def test_idle_tokens_keep_the_residual_alone(family: Family) -> None:
    model, x = family.model(), family.inputs()
    idle = gtp_fx.optimize(model, schedule=family.schedule, example_inputs=x, compile=False)
    assert error(idle(x), on(family, model, family.blocks, idle=True)(x)) < 1e-5
    assert error(idle(x), on(family, model, family.blocks)(x)) > 1e-4


def skipping_by_hand(parts: Parts, count: int) -> list[int]:
    """Of the first image, numbers on the grid."""
    found = []
    for index_n, score_n in zip(parts.windows.index_Wn, parts.score_BWn[0], strict=True):
        score_n = torch.where(index_n < 0, -1.0 - torch.arange(len(index_n)), score_n)
        left_1P = select(score_n[None], count)[1]
        found.append(index_n[left_1P[0]])
    left = torch.cat(found)
    places_NR = parts.windows.places_NR
    numbers_N = places_NR[:, 0] * (int(places_NR[:, 1].max()) + 1) + places_NR[:, 1]
    return sorted(numbers_N[left[left >= 0]].tolist())


@pytest.mark.parametrize("family", [SWIN, PADDED, TORCHVISION, HIERA, TWINS], ids=lambda family: family.name)
@torch.no_grad()
def test_journeys_say_which_patches_skip(family: Family, tmp_path: Path) -> None:
    """Rolled, padded, pooled: where on the image a window's tokens are, and padding is nowhere."""
    model, x = family.model(), family.inputs(batch=1)
    fast = gtp_fx.optimize(model, schedule=family.schedule, example_inputs=family.inputs(), compile=False)
    views = journeys(fast.graph_module, fast.sites, fast.report.sites, x)
    hand = on(family, model, family.blocks, idle=True)
    hand(x)
    assert len(views) == len(family.blocks)
    for view, (name, count) in zip(views, family.blocks.items(), strict=True):
        assert isinstance(view, SkipView) and view.layer.startswith(name)
        assert view.skipped.tolist() == skipping_by_hand(hand.seen[name], count), name
    draw_journeys(views, torch.rand(*family.shape[1:], 3), family.name, tmp_path / "skips.png")
    assert Image.open(tmp_path / "skips.png").width > 1000
    assert json.loads(json.dumps(views[0].to_dict()))["skipped"] == views[0].skipped.tolist()


@cache
def marked(family: Family) -> fx.GraphModule:
    """Its graph, blocks marked, as the rewriting passes find it; they change copies."""
    model = family.model()
    gm = capture_module(model, call_signature(model, family.inputs()))
    for rewrite in (normalise, drop_trivial_masks, einsum_to_matmul, fuse_attention, mark_blocks):
        gm = rewrite(gm)
        propagate_shapes(gm, after=rewrite.__name__)
    return gm


def branches(gm: fx.GraphModule) -> list[Branch]:
    return [block.branch for block in read_blocks(gm) if block.branch is not None]


def at_once(target: Any, *args: Any) -> Any:
    """What `convert` is to call instead of inserting it into a graph."""
    return target(*args)


def painted(parts: Parts) -> Tensor:
    """[2, N, 3]: each token's row and column on the image and the image's number, from 1 on, since padding is 0."""
    images = torch.arange(1, 3)[:, None, None]
    tokens = torch.cat(
        [parts.windows.places_NR.expand(2, -1, -1) + 1, images.expand(2, len(parts.windows.places_NR), 1)], dim=2
    )
    return tokens.float()


@every_family
@torch.no_grad()
def test_tokens_painted_with_their_places_are_found_again(family: Family) -> None:
    """There by window, in the order that the family's own windows have by hand, and back as they were."""
    model = family.model()
    gm = marked(family)
    typing = infer_types(gm.graph)
    walk = on(family, model, dict.fromkeys(family.branched, 0))
    walk(family.inputs())
    found = branches(gm)
    for branch, parts in zip(found, walk.seen.values(), strict=True):
        windows = parts.windows
        tokens = painted(parts)
        by_hand = windows.of(tokens).flatten(0, 1)
        assert (branch.windows, branch.tokens) == tuple(windows.index_Wn.shape)
        for node in (*branch.entries, branch.result):
            kind: TensorType = typing.type(node)
            own = tokens.reshape(2, *node.meta["val"].shape[1:-1], 3)
            region: TensorType = (*branch.region, (Plain(3),))
            rows = convert(at_once, own, (*kind[:-1], (Plain(3),)), region)
            assert torch.equal(rows, by_hand)
            assert torch.equal(convert(at_once, rows, region, (*kind[:-1], (Plain(3),))), own)
        image = image_layout(branch.region)
        places = torch.ops.gtp_fx.grid_places([axis[0].whole_size for axis in image[1:]], tokens)
        arranged = convert(at_once, places + 1, (*image, (Plain(2),)), by_window(branch.region, (Plain(2),)))
        assert torch.equal(arranged, by_hand[: branch.windows, :, :2].long())


@dataclass(frozen=True)
class Skips:
    """What of a plan says how many tokens of each window skip, by block."""

    skipping: dict[int, int]
    strategy: gtp_fx.GTP


@every_family
@torch.no_grad()
def test_recovering_nothing_everywhere_is_the_original(family: Family) -> None:
    """All that branch placement inserts, and no token skips: the numbers are the model's."""
    model, x = family.model(), family.inputs(batch=3)
    gm = marked(family)
    indices = [block.index for block in read_blocks(gm) if block.branch is not None]
    plan: Any = Skips(dict.fromkeys(indices, 0), gtp_fx.GTP())
    whole = skip_branches(gm, plan)
    recovers = [node for node in whole.graph.nodes if node.target is torch.ops.gtp_fx.recover.default]
    assert len(recovers) == len(indices) == len(family.branched)
    made, wanted = whole(x), tensors(model(x))
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
    for a, b in zip(leaves, wanted, strict=True):
        assert ((a - b).abs().max() / b.abs().max()) < 1e-5


class Copies(nn.Module):
    """A timm Swin whose branches return the token itself, and whose attention returns nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.stages = model.layers
        for block in (block for stage in model.layers for block in stage.blocks):
            block.norm2 = nn.Identity()
            block.mlp = nn.Linear(block.dim, block.dim, bias=False)
            block.mlp.weight.copy_(torch.eye(block.dim))
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
        self.embed = nn.Conv2d(block.dim, block.dim, 1, bias=False)
        self.embed.weight.copy_(torch.eye(block.dim)[:, :, None, None])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = self.embed(x_BCHW).permute(0, 2, 3, 1)
        for stage in self.stages:
            x_BHWC = stage(x_BHWC)
        return x_BHWC


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1])
def test_places_in_the_tokens_come_out_where_they_went_in(block: int) -> None:
    """Two blocks of Swin on 14 x 21, the second rolled. A branch gives each token its own place; one that skips, its neighbours'."""
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(56, 84), depths=(2,), num_heads=(2,), embed_dim=32
    )
    model = Copies(enliven(swin)).eval()
    places_HWR = torch.cartesian_prod(torch.arange(14), torch.arange(21)).reshape(14, 21, 2).float()
    x = torch.randn(2, 32, 14, 21, generator=torch.Generator().manual_seed(0))
    x[:, :2] = places_HWR.permute(2, 0, 1)
    whole = model(x)
    assert torch.equal(whole[..., :2], 4 * places_HWR.expand(2, -1, -1, -1)), "each block doubles what it is given"
    schedule = [0, 0]
    schedule[block] = 24
    found = gtp_fx.optimize(model, schedule=schedule, strategy=RECOVER, example_inputs=x, compile=False)(x)[..., :2]
    kept = (found == 4 * places_HWR).all(-1)
    # The other block doubles as well, and this one adds the branch to what there was: place + result.
    result = (found / 2 - places_HWR).sub(places_HWR).abs().amax(-1)
    assert (result[~kept] <= 1.0 + 1e-5).float().mean() > 0.9, "all but those without a neighbour that stays"
    assert kept.sum() >= 2 * 6 * 25
    assert (~kept).sum() > 2 * 6 * 12, "a mean of neighbours may be its own place, but seldom is"


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "batches"),
    [(SWIN, (2, 5, 1)), (SAM, (3, 2)), (SAM, (1,))],
    ids=lambda value: value.name if isinstance(value, Family) else f"batches {value}",
)
def test_both_doors_agree_at_any_batch(family: Family, batches: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    model = family.model()
    fast = gtp_fx.optimize(model, flops_budget=0.95, example_inputs=family.inputs(), compile=False)
    assert any(row.windows for row in fast.report.sites)
    door = Door(flops_budget=0.95)
    compiled = torch.compile(model, backend=door, fullgraph=True)
    for batch in batches:
        x = family.inputs(batch)
        torch.testing.assert_close(compiled(x), fast(x), rtol=1e-5, atol=1e-5)
    assert {made.schedule for made in door.made} == {fast.schedule}
    assert not door.refused


@torch.no_grad()
def test_windows_are_counted_per_image_through_both_doors() -> None:
    torch._dynamo.reset()
    model, x = SWIN.model(), SWIN.inputs()
    fast = gtp_fx.optimize(model, schedule=SWIN.schedule, example_inputs=x, compile=False)
    door = Door(schedule=SWIN.schedule)
    torch.compile(model, backend=door, fullgraph=True)(x)
    assert [row.windows for row in door.made[0].report.sites] == [row.windows for row in fast.report.sites] == [6, 6, 2]


@pytest.mark.parametrize(("block", "count"), [(0, 49), (1, 60)])
def test_a_window_keeps_a_token(block: int, count: int) -> None:
    schedule = [0, 0, 0]
    schedule[block] = count
    with pytest.raises(gtp_fx.ScheduleError, match="at least one has to stay"):
        gtp_fx.optimize(SWIN.model(), schedule=schedule, example_inputs=SWIN.inputs(), compile=False)


def refusals(model: nn.Module, x: Tensor) -> str:
    """What is said of blocks that are left as they are."""
    try:
        fast = gtp_fx.optimize(enliven(model).eval(), flops_budget=0.98, example_inputs=x, compile=False)
    except gtp_fx.UnsupportedModelError as error:
        return str(error)
    return "\n".join(map(str, fast.report.refusals))


COATNET = from_timm(
    "coatnet_0_rw_224", img_size=128, depths=(1, 1, 2, 1), embed_dim=(32, 32, 32, 32), stem_width=(16, 32)
)
SEGFORMER = from_hf("SegformerForImageClassification", depths=[1] * 4, num_labels=10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (COATNET, (3, 128, 128), "isn't laid out as tokens with features last"),
        # Convolutions with stride 8, 4 and 2 over 50, 25 and 13 rows: the keys' cells are not all alike.
        (SEGFORMER, (3, 200, 200), "segformer.stages.0.blocks.0.attention: .*queries and keys run over different"),
        (HIERA.model, (3, 64, 96), "blocks.2.attn: .*queries and keys run over different patch tokens"),
    ],
    ids=["channels first", "cells that don't divide", "queries that are pooled"],
)
def test_why_a_block_has_no_branch(make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    assert re.search(reason, refusals(make(), torch.randn(2, *shape)))


class ConvMlp(nn.Module):
    """Only the activation behind its convolution is token-wise: nothing worth skipping."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.conv, self.grid = nn.Conv2d(dim, dim, 3, padding=1), grid

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.conv(x_BNC.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2).relu()


@torch.no_grad()
def test_a_convolution_at_the_end_of_a_branch_is_named() -> None:
    model: Any = SAM.model()
    for block in model.blocks:
        block.mlp = ConvMlp(64, (10, 12))
    with pytest.raises(gtp_fx.UnsupportedModelError, match=r"not token-wise at its end \(a convolution, say\)"):
        gtp_fx.optimize(model, schedule=[3, 3], example_inputs=SAM.inputs(), compile=False)
