"""Duties of every strategy: budgets, tokens restored for dense outputs, both entry points, any batch, refusals."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import gtp_fx
from bench.dynamo_door import Door
from gtp_fx.strategies import STRATEGIES
from gtp_fx.strategies.sites import SiteShape

from support.captured import Built, optimised
from support.plain_vit import built
from support.window_families import SWIN
from support.zoo import BY_NAME, WITH_DEAD_TOKENS, Row, build, enliven, images, in_tiers

WITHOUT_CLS = {
    "topk": gtp_fx.TopK(score="broadcast-mean"),
    "ppt": gtp_fx.strategies.PPT(score="broadcast-mean", blocks=(0, 1)),
    "mergence": gtp_fx.strategies.Mergence(score="broadcast-mean"),
    "idle": gtp_fx.strategies.Idle(score="broadcast-mean"),
}
OWN = [name for name, cls in STRATEGIES.items() if cls.__module__.startswith("gtp_fx.")]


def optimized(model: torch.nn.Module, strategy: Any, **options: Any) -> gtp_fx.OptimizedModel:
    return gtp_fx.optimize(model, strategy=strategy, compile=False, **options)


def changed(row: Row, strategy: Any, **options: Any) -> gtp_fx.OptimizedModel:
    """Return the optimised model; its outputs are finite, of the original's shape, different, and batch independent."""
    model, x = build(row), images(row, 3)
    fast = optimized(model, strategy, **options)
    wanted, found = model(x), fast(x)
    assert found.shape == wanted.shape and found.isfinite().all()
    assert (found - wanted).abs().max() > 1e-4 * wanted.abs().max(), "what changes nothing proves nothing"
    torch.testing.assert_close(fast(x[1:2]), found[1:2], rtol=1e-4, atol=1e-4)
    return fast


@pytest.mark.parametrize("name", in_tiers(OWN, *(name for name in OWN if name != "idle")))
@pytest.mark.parametrize("arch", ["deit", pytest.param("vit-gap", marks=pytest.mark.nightly)])
def test_the_budget_is_met_as_torch_counts(name: str, arch: str) -> None:
    """With CLS and without; the FLOPs of the graph, the strategy's own work too, are what the report says."""
    row = BY_NAME[arch]
    strategy = WITHOUT_CLS.get(name, name) if row.prefix == 0 else name
    if name == "ppt":
        strategy = gtp_fx.strategies.PPT(score="cls-mean" if row.prefix else "broadcast-mean", blocks=(0, 1))
    if name == "cluster":
        strategy = gtp_fx.strategies.Cluster(after=1)
    fast = changed(row, strategy, flops_budget=0.8, disabled_passes=WITH_DEAD_TOKENS)
    graph = copy.deepcopy(fast.graph_module).to("meta")
    with FlopCounterMode(display=False) as counter:  # on meta: some releases count a CPU's fused attention as nothing
        graph(images(row, 1).to("meta"))
    assert counter.get_total_flops() == fast.report.flops_after <= 0.8 * fast.report.flops_before


@pytest.mark.parametrize("name", in_tiers(OWN, *(name for name in OWN if name != "gtp")))
def test_a_token_map_has_every_patch(name: str) -> None:
    """What leaves comes back at a dense output; at 1.0 nothing changes at all."""
    row = BY_NAME["dinov2"]
    model = timm.create_model(
        row.arch, depth=3, img_size=row.img_size, num_classes=0, global_pool="", embed_dim=64, num_heads=2
    )
    model, x = enliven(model).eval(), images(row)
    strategy = (
        gtp_fx.strategies.PPT(blocks=(0, 1))
        if name == "ppt"
        else gtp_fx.strategies.Cluster(after=1)
        if name == "cluster"
        else name
    )
    fast = optimized(model, strategy, flops_budget=0.75, example_inputs=x)
    assert fast(x).shape == model(x).shape == (2, 82, 64)
    exact = optimized(model, strategy, flops_budget=1.0, example_inputs=x)
    torch.testing.assert_close(exact(x), model(x), rtol=1e-4, atol=1e-5)


def test_idle_tokens_come_back_as_they_were() -> None:
    """A token that idled since the first block ends as it was behind that block's attention."""
    row = BY_NAME["dinov2"]
    model = timm.create_model(
        row.arch, depth=2, img_size=row.img_size, num_classes=0, global_pool="", embed_dim=64, num_heads=2
    )
    model, x = enliven(model).eval(), images(row)
    model.norm = torch.nn.Identity()
    stood: list[torch.Tensor] = []
    model.blocks[0].drop_path1.register_forward_hook(lambda _, __, out: stood.append(out))
    before = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    fast = optimized(model, "idle", schedule=[60, 0], example_inputs=x)
    (provenance,) = fast.provenance(x)
    stood.clear()
    model(x)
    behind_attention = (before + stood[0])[:, 1:]
    found = fast(x)[:, 1:]
    for image in range(2):
        idle = sorted(set(range(81)) - set(provenance.index[image].tolist()))
        assert len(idle) == 60
        torch.testing.assert_close(found[image, idle], behind_attention[image, idle], rtol=1e-4, atol=1e-5)


class PostNorm(nn.Module):
    """Three layers with their norms behind, of whose last only CLS is read: [B, 3, 24, 24] -> [B, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 7)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        found: Tensor = self.head(self.layers(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1))[:, 0])
        return found


@pytest.mark.nightly
def test_idle_tokens_are_back_where_the_last_site_is_the_blocks_end() -> None:
    """With norms behind, a layer's first add begins and ends it: what is removed there is back at once."""
    source = Built(lambda: built(PostNorm), (3, 24, 24))
    x = source.inputs()
    first, both, none = (
        optimised(source, strategy="idle", schedule=counts).graph_module(x)
        for counts in ([9, 0, 0], [9, 9, 0], [0, 0, 0])
    )
    torch.testing.assert_close(both, first, rtol=1e-5, atol=1e-5)
    assert (both - none).abs().max() > 1e-4


@pytest.mark.xdist_group("swin")
def test_what_a_strategy_cannot_do_is_named() -> None:
    pooled = BY_NAME["vit-gap"]
    for name in WITHOUT_CLS:
        with pytest.raises(gtp_fx.UnsupportedModelError, match="no prefix token here: score='broadcast-mean'"):
            optimised(pooled, strategy=name, flops_budget=0.8)
    for name in ("tome", "mergence", "cluster", "halting", "saliency", "random", "ppt"):
        with pytest.raises(gtp_fx.UnsupportedModelError, match="'regeneration', 'gtp', 'idle' and 'topk' do that"):
            optimised(SWIN, strategy=name, flops_budget=0.9)
    with pytest.raises(gtp_fx.ScheduleError, match="strategy 'saliency' takes them at blocks 0 alone"):
        optimised(pooled, strategy="saliency", schedule=[0, 5, 0])


@pytest.mark.xdist_group("swin")
def test_windows_take_those_that_can_skip() -> None:
    for strategy in (gtp_fx.strategies.Idle(score="broadcast-mean"), gtp_fx.TopK(score="broadcast-mean")):
        fast = optimised(SWIN, strategy=strategy, flops_budget=0.85)
        assert fast.report.flops_ratio <= 0.85 and fast.graph_module(SWIN.inputs()).shape == (2, 10)


@gtp_fx.strategies.register_strategy
@dataclass(frozen=True)
class Norm(gtp_fx.strategies.Grouping):
    """Tokens of small norm leave: the ten lines of the documentation."""

    name: ClassVar[str] = "norm"

    def group(self, tokens: gtp_fx.strategies.Tokens) -> gtp_fx.strategies.Groups:
        return gtp_fx.strategies.dropped(tokens.patches_BnC.norm(dim=-1), tokens.removed)


def test_a_users_own_strategy_works_like_any_other() -> None:
    fast = changed(BY_NAME["deit"], "norm", flops_budget=0.7)
    assert fast.report.strategy == str(Norm()) and fast.report.flops_ratio <= 0.7
    assert gtp_fx.optimize(build(BY_NAME["deit"]), strategy=Norm(), schedule=[9, 0, 0], compile=False).schedule


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["tome", "semantic"])
def test_both_doors_take_any_strategy(strategy: str) -> None:
    row = BY_NAME["clip"]
    model, x = build(row), images(row)
    options = {"schedule": [40, 0, 0], "strategy": strategy}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=Door(**options))
    torch.testing.assert_close(compiled(x), optimized(model, **options)(x), rtol=1e-3, atol=1e-3)


@gtp_fx.strategies.register_strategy
@dataclass(frozen=True)
class Alike(gtp_fx.strategies.Grouping):
    """Multiplies matrices, and says so where `told`."""

    name: ClassVar[str] = "alike"
    told: bool = True
    lies: str = ""

    def group(self, tokens: gtp_fx.strategies.Tokens) -> gtp_fx.strategies.Groups:
        unit_BnC = F.normalize(tokens.patches_BnC, dim=-1)
        groups = gtp_fx.strategies.dropped((unit_BnC @ unit_BnC.transpose(1, 2)).mean(dim=2).neg(), tokens.removed)
        if self.lies == "sizes":
            return gtp_fx.strategies.Groups(groups.kept_BK, groups.removed_BP, size_BK=groups.kept_BK.float())
        return groups.kept_BK if self.lies == "type" else groups  # type: ignore[return-value]

    def group_flops(self, site: SiteShape) -> Any:
        return 2 * site.images * site.patches_in**2 * site.channels * self.told


@pytest.mark.nightly
def test_a_strategy_that_tells_less_than_it_does_is_named() -> None:
    model = build(BY_NAME["clip"])
    assert optimized(model, Alike(), flops_budget=0.7).report.flops_ratio <= 0.7
    with pytest.raises(gtp_fx.OptionError, match=r"Alike\.group_flops has to return the FLOPs of the matrix products"):
        optimized(model, Alike(told=False), flops_budget=0.7)
    with pytest.raises(
        gtp_fx.OptionError, match=r"Alike.group\(\) gave kept, removed, size, and its class says kept, removed"
    ):
        optimized(model, Alike(lies="sizes"), flops_budget=0.7)
    with pytest.raises(gtp_fx.OptionError, match=r"returned Tensor: return gtp_fx\.strategies\.Groups"):
        optimized(model, Alike(lies="type"), flops_budget=0.7)


def test_names_that_can_not_be_registered() -> None:
    @dataclass(frozen=True)
    class Taken(gtp_fx.strategies.Grouping):
        name: ClassVar[str] = "tome"

    class NoDataclass(gtp_fx.strategies.Grouping):
        name: ClassVar[str] = "mine"

    @dataclass(frozen=True)
    class Stranger(gtp_fx.strategies.Grouping):
        name: ClassVar[str] = "stranger"

    with pytest.raises(gtp_fx.OptionError, match="is one of gtp_fx's own"):
        gtp_fx.strategies.register_strategy(Taken)
    with pytest.raises(gtp_fx.OptionError, match=r"write @dataclass\(frozen=True\) above it"):
        gtp_fx.strategies.register_strategy(NoDataclass)
    with pytest.raises(gtp_fx.OptionError, match="isn't registered"):
        optimized(build(BY_NAME["clip"]), Stranger(), flops_budget=0.7)


@gtp_fx.strategies.register_saliency("left")
def left(x_BCHW: torch.Tensor) -> torch.Tensor:
    """What is farther left matters more."""
    return torch.arange(x_BCHW.shape[-1], 0, -1.0).expand(x_BCHW.shape[0], *x_BCHW.shape[-2:])


def test_a_users_map_decides() -> None:
    """Of 14 columns the last four are minor, and are one token: where the 10th column ends."""
    row = BY_NAME["deit"]
    model, x = build(row), images(row)
    fast = optimized(model, gtp_fx.strategies.Saliency(map="left", fused=1), schedule=[14 * 4 - 1, 0, 0])
    (found,) = fast.provenance(x)
    columns = found.index[0] % 14
    assert (columns < 10).sum() == 140 and found.index.shape == (2, 141)
    fused = found.matrix[0, int((columns >= 10).nonzero())]
    assert fused.count_nonzero() == 56 and fused.sum().item() == pytest.approx(1.0)
    with pytest.raises(gtp_fx.OptionError, match="register your own"):
        gtp_fx.strategies.Saliency(map="nobody's")
