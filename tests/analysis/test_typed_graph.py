"""Analyses are made once a graph, and none outlives an edit of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.ops import aten

import gtp_fx
from gtp_fx.analysis import typed_graph as module
from gtp_fx.analysis.marks import MARK
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph.edit import copy_of, set_args
from gtp_fx.passes.exact.drop_dead_tokens import drop_dead_tokens
from gtp_fx.passes.exact.fuse_attention import fuse_attention
from gtp_fx.passes.exact.mark_blocks import mark_blocks
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.passes.exact.split_projections import split_projections
from gtp_fx.types.infer import SiteTyping, WholeTyping

from support.graphs_by_hand import node, patches, traced

INPUTS = (torch.randn(2, 3, 8, 6), torch.randn(8, 3, 2, 2), torch.randn(24, 8))


def net(image: Tensor, embed: Tensor, qkv: Tensor) -> Tensor:
    """A block over 4 x 3 patches, and the mean of them."""
    x = patches(image, embed)
    q, k, v = F.linear(x, qkv).reshape(2, 12, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return (x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 12, 8)).mean(1)


@pytest.fixture
def gm() -> fx.GraphModule:
    return mark_blocks(normalise(traced(net, *INPUTS)))


def test_each_analysis_is_made_once(gm: fx.GraphModule) -> None:
    typed = typed_graph(gm.graph)
    site = frozenset({node(gm, aten.add.Tensor)})
    assert typed_graph(gm.graph) is typed
    assert typed.whole is typed.whole
    assert typed.with_sites(site) is typed.with_sites(site)
    assert typed.blocks is typed.blocks
    assert typed.live() is typed.live()
    assert typed.live(needs_full_maps=True) is not typed.live()
    assert typed.with_sites(site, ends=site) is not typed.with_sites(site)


def test_whole_types_and_types_with_sites_are_of_two_kinds(gm: fx.GraphModule) -> None:
    typed = typed_graph(gm.graph)
    assert type(typed.whole) is WholeTyping
    assert type(typed.with_sites(frozenset())) is SiteTyping


def _new_argument(gm: fx.GraphModule) -> None:
    add = node(gm, aten.add.Tensor)
    set_args(add, add.args[::-1])


def _new_target(gm: fx.GraphModule) -> None:
    node(gm, aten.add.Tensor).target = aten.mul.Tensor


def _new_keyword(gm: fx.GraphModule) -> None:
    node(gm, aten.add.Tensor).update_kwarg("alpha", 2)


def _new_value(gm: fx.GraphModule) -> None:
    linear = node(gm, aten.linear.default)
    linear.meta["val"] = linear.meta["val"].clone()


def _node_more(gm: fx.GraphModule) -> None:
    add = node(gm, aten.add.Tensor)
    with gm.graph.inserting_after(add):
        gm.graph.call_function(aten.relu.default, (add,))


def _another_operand(gm: fx.GraphModule) -> None:
    node(gm, aten.mean.dim).replace_input_with(node(gm, aten.add.Tensor), node(gm, aten.transpose.int))


def _replaced_everywhere(gm: fx.GraphModule) -> None:
    add = node(gm, aten.add.Tensor)
    add.replace_all_uses_with(add.args[0])


EDITS = (
    _new_argument,
    _new_target,
    _new_keyword,
    _new_value,
    _node_more,
    _another_operand,
    _replaced_everywhere,
)


@pytest.mark.parametrize("edit", EDITS)
def test_no_analysis_outlives_an_edit(gm: fx.GraphModule, edit: Callable[[fx.GraphModule], None]) -> None:
    """Neither by asking for the graph's nor from one that was had before."""
    before = typed_graph(gm.graph)
    whole, blocks = before.whole, before.blocks
    edit(gm)
    assert typed_graph(gm.graph) is not before
    assert typed_graph(gm.graph).whole is not whole
    for ask in (
        lambda: before.whole,
        lambda: before.blocks,
        lambda: before.live(),
        lambda: before.with_sites(frozenset()),
    ):
        with pytest.raises(AssertionError, match="edited after it was typed"):
            ask()
    assert len(blocks) == 1, "what was had before may be used through the edit"


def test_a_mark_changes_blocks_and_no_types(gm: fx.GraphModule) -> None:
    typed = typed_graph(gm.graph)
    whole, blocks, live = typed.whole, typed.blocks, typed.live(needs_full_maps=True)
    assert len(blocks) == 1
    for marked in list(gm.graph.nodes):
        marked.meta.pop(MARK, None)
    assert typed_graph(gm.graph).whole is whole
    assert typed_graph(gm.graph).blocks == ()
    assert typed_graph(gm.graph).live(needs_full_maps=True) is not live


def test_a_copy_has_analyses_of_its_own(gm: fx.GraphModule) -> None:
    typed = typed_graph(gm.graph)
    for other in (copy_of(gm).graph, copy.deepcopy(gm.graph), copy.copy(gm.graph)):
        assert typed_graph(other) is not typed
        assert typed_graph(other).graph is other
    assert typed_graph(gm.graph) is typed


def test_passes_with_nothing_to_do_return_their_input(gm: fx.GraphModule) -> None:
    for rewrite in (fuse_attention, split_projections, drop_dead_tokens):
        assert rewrite(gm) is gm


def test_a_plain_model_is_typed_a_few_times() -> None:
    """Behind the exact passes: whole, and with every site; the original; and the graph that tokens leave."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, global_pool="avg").eval()
    with (
        mock.patch.object(module, "infer_types", wraps=module.infer_types) as whole,
        mock.patch.object(module, "infer_with_sites", wraps=module.infer_with_sites) as with_sites,
        mock.patch.object(module, "read_blocks", wraps=module.read_blocks) as blocks,
    ):
        gtp_fx.optimize(model, flops_budget=0.8, compile=False)
    assert (whole.call_count, with_sites.call_count, blocks.call_count) == (2, 1, 1)
