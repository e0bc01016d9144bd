"""Each pass on a graph made by hand: what it does, and its twin, a graph on which it has nothing to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.ops import aten

from gtp_fx.analysis.liveness import ALL, live_tokens
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph.edit import set_args
from gtp_fx.graph.verify import InconsistentGraph, propagate_shapes
from gtp_fx.passes.exact.drop_dead_tokens import drop_dead_tokens
from gtp_fx.passes.exact.drop_trivial_masks import drop_trivial_masks
from gtp_fx.passes.exact.fuse_attention import fuse_attention
from gtp_fx.passes.exact.mark_blocks import mark_blocks
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.passes.exact.split_projections import split_projections
from gtp_fx.types.infer import infer_types

from support.graphs_by_hand import calls, node, patches, traced

IMAGE = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
EMBED = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 0.3
QKV = torch.randn(24, 8, generator=torch.Generator().manual_seed(2))
CLS = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(3))
INPUTS = (IMAGE, EMBED, QKV, CLS)


def block(x: Tensor, qkv: Tensor) -> Tensor:
    """Attention and its residual: [B, N, 8], two heads."""
    batch, tokens, _ = x.shape
    q, k, v = F.linear(x, qkv).reshape(batch, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, 8)


def stem(image: Tensor, embed: Tensor, cls: Tensor) -> Tensor:
    return torch.cat([cls.expand(2, -1, -1), patches(image, embed)], dim=1)


def cls_head(image: Tensor, embed: Tensor, qkv: Tensor, cls: Tensor) -> Tensor:
    return block(block(stem(image, embed, cls), qkv), qkv)[:, 0]


def mean_head(image: Tensor, embed: Tensor, qkv: Tensor, cls: Tensor) -> Tensor:
    return block(block(stem(image, embed, cls), qkv), qkv)[:, 1:].mean(dim=1)


def spelled(gm: fx.GraphModule) -> list[str]:
    return [f"{n.target}" for n in gm.graph.nodes if n.op == "call_function"]


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.4 + bias).softmax(-1) @ v


SPELLINGS = {
    "scale behind the product, then a bias": attention_by_hand,
    "scale on the queries": lambda q, k, v, b: ((q * 0.3) @ k.mT).softmax(-1) @ v,
    "divided": lambda q, k, v, b: torch.softmax(q @ k.permute(0, 1, 3, 2) / 3.0, dim=3) @ v,
    "bias scaled with the logits": lambda q, k, v, b: ((b + q @ k.mT) * 0.5).softmax(-1) @ v,
    "two biases": lambda q, k, v, b: (q @ k.mT + b + 2 * b).softmax(-1) @ v,
    "a factor for each head": lambda q, k, v, b: ((q @ k.mT) * b.mean((-2, -1), keepdim=True)).softmax(-1) @ v,
    "cast for the softmax": lambda q, k, v, b: (q @ k.mT).softmax(-1, dtype=torch.float32).to(v.dtype) @ v,
}


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_attention_in_any_spelling_becomes_one_operator(name: str) -> None:
    q, k, v, bias = (torch.randn(2, 3, 5, n, generator=torch.Generator().manual_seed(n)) for n in (4, 4, 4, 5))
    gm = traced(SPELLINGS[name], q, k, v, bias)
    spelled_out = fuse_attention(normalise(gm))
    assert calls(spelled_out, aten.scaled_dot_product_attention.default) == 1
    assert not calls(spelled_out, aten.softmax.int)
    torch.testing.assert_close(spelled_out(q, k, v, bias), gm(q, k, v, bias))


def merged_heads(image: Tensor, embed: Tensor, qkv: Tensor, heads_first: bool = False) -> Tensor:
    """Attention by bmm over images and heads in one dimension: [8, 12, 2]."""
    x = patches(image, embed)
    q, k, v = F.linear(x, qkv).reshape(2, -1, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
    if heads_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    q, k, v = (t.reshape(8, -1, 2) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)


@pytest.mark.parametrize("heads_first", [False, True])
def test_heads_that_are_merged_with_images_are_told_apart_or_left(heads_first: bool) -> None:
    """4 heads of 2 images: a site has to know whose scores are whose."""
    gm = normalise(traced(lambda *inputs: merged_heads(*inputs, heads_first=heads_first), *INPUTS[:3]))
    spelled_out = fuse_attention(gm)
    assert calls(spelled_out, aten.scaled_dot_product_attention.default) == (not heads_first)
    torch.testing.assert_close(spelled_out(*INPUTS[:3]), gm(*INPUTS[:3]))


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v, b: (
            torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), b[0, :, :3, 0].mean(1)[:, None].expand(3, 3)) @ v
        ),
        lambda q, k, v, b: ((q @ k.mT).softmax(-1) * b.sigmoid()) @ v,
        lambda q, k, v, b: (q @ k.mT).softmax(-2) @ v,
        lambda q, k, v, b: ((a := (q @ k.mT).softmax(-1)) @ v).sum() + a.sum(),
        lambda q, k, v, b: F.dropout((q @ k.mT).softmax(-1), 0.5, training=True) @ v,
    ],
    ids=["heads are mixed", "gated", "over queries", "the map is used elsewhere", "dropout is on"],
)
def test_attention_that_is_another_function_stays_as_it_is(function: Callable[..., Tensor]) -> None:
    q, k, v, bias = (torch.randn(2, 3, 5, n, generator=torch.Generator().manual_seed(n)) for n in (4, 4, 4, 5))
    gm = normalise(traced(function, q, k, v, bias))
    assert spelled(fuse_attention(gm)) == spelled(gm)


def all_true(x: Tensor) -> Tensor:
    """As libraries build it: positions compared with zero, expanded over images."""
    tokens = x.shape[-2]
    return (torch.arange(tokens) >= 0)[None, None, :, None].expand(x.shape[0], 1, tokens, tokens)


def test_a_mask_that_hides_nothing_goes() -> None:
    q = torch.randn(2, 3, 5, 4)
    gm = drop_trivial_masks(traced(lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=all_true(q)), q))
    assert spelled(gm) == ["aten.scaled_dot_product_attention.default"]
    assert node(gm, aten.scaled_dot_product_attention.default).args[3] is None
    zero = traced(lambda x: x * 2.0 + torch.where(torch.arange(4) >= 0, torch.zeros(()), -1e9), q)
    assert spelled(drop_trivial_masks(zero)) == ["aten.mul.Tensor"]


def test_a_mask_that_hides_something_or_comes_from_an_input_stays() -> None:
    q = torch.randn(2, 3, 5, 4)

    def masked(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=(torch.arange(5) > 0)[None])

    def given(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=q[:, :1, :, :1] > -100)

    for function in (masked, given):
        gm = traced(function, q)
        assert spelled(drop_trivial_masks(gm)) == spelled(gm)


def test_a_padding_mask_of_no_padding_goes() -> None:
    """As encoders of images and text make it: it hides from attention, and zeroes tokens, where there are any."""

    def padded(x: Tensor) -> Tensor:
        parts = [torch.zeros(x.shape[0], 2), torch.zeros(x.shape[0], 3)]
        hidden = aten._to_copy.default(torch.cat(parts, dim=1), dtype=torch.bool)
        shown = x * (1 - hidden.unsqueeze(-1).type_as(x))
        return (shown @ shown.transpose(-2, -1)).masked_fill(hidden.unsqueeze(1), float("-inf")).softmax(-1) @ shown

    x = torch.randn(2, 5, 4)
    gm = drop_trivial_masks(normalise(traced(padded, x)))
    assert spelled(gm) == ["aten.transpose.int", "aten.matmul.default", "aten.softmax.int", "aten.matmul.default"]
    assert torch.equal(gm(x), padded(x))


def test_a_mask_with_padding_in_it_stays() -> None:
    def padded(x: Tensor) -> Tensor:
        hidden = torch.cat([torch.zeros(2, 4), torch.ones(2, 1)], dim=1)
        return x * (1 - hidden.unsqueeze(-1))

    x = torch.randn(2, 5, 4)
    gm = drop_trivial_masks(normalise(traced(padded, x)))
    assert spelled(gm)[-1] == "aten.mul.Tensor"
    assert torch.equal(gm(x), padded(x))


def test_a_cast_names_its_type_alone_and_goes_where_it_changes_none() -> None:
    def cast(x: Tensor, y: Tensor) -> Tensor:
        half = (x + 1).type_as(y)
        return aten._to_copy.default(half, dtype=torch.float16).to(torch.float32) * 2

    inputs = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float16)
    gm = normalise(traced(cast, *inputs))
    assert spelled(gm) == ["aten.add.Tensor", "aten.to.dtype", "aten.to.dtype", "aten.mul.Tensor"]
    assert [n.args[1] for n in gm.graph.nodes if n.target is aten.to.dtype] == [torch.float16, torch.float32]
    assert torch.equal(gm(*inputs), cast(*inputs))


def test_normalise_strips_what_says_nothing() -> None:
    def wordy(x: Tensor) -> Tensor:
        y = F.dropout(x * 2.0, 0.5, training=False)
        return y[:, :].expand(2, 3).clone() + 1.0

    gm = traced(wordy, torch.ones(2, 3))
    lean = normalise(gm)
    assert spelled(lean) == ["aten.mul.Tensor", "aten.add.Tensor"]
    assert torch.equal(lean(torch.ones(2, 3)), gm(torch.ones(2, 3)))


def test_normalise_drops_views_that_are_undone_and_no_others() -> None:
    def written(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        back = y.permute(1, 2, 0).reshape(3, 2, 2, 2).view(3, 4, 2).permute(2, 0, 1)
        return back + 1, y.transpose(0, 2).reshape(2, 3, 4) + 1

    x = torch.randn(2, 3, 4)
    gm = normalise(traced(written, x))
    assert spelled(gm) == [
        *("aten.exp.default", "aten.add.Tensor"),
        *("aten.transpose.int", "aten.reshape.default", "aten.add.Tensor"),
    ]
    torch.testing.assert_close(gm(x), written(x), rtol=0, atol=0)


def test_what_is_stacked_and_then_a_row_is_a_row_from_the_beginning() -> None:
    def row(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
        return ((torch.stack([x, y], dim=1) + table[:, None]).relu()).view(2, 10, 4)

    inputs = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4)
    gm = normalise(traced(row, *inputs))
    assert "aten.stack.default" not in spelled(gm) and "aten.cat.default" in spelled(gm)
    assert torch.equal(gm(*inputs), row(*inputs))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.stack([x, 2 * x], dim=1).mean(1),
        lambda x: torch.stack([x, 2 * x], dim=1).view(4, 5, 4),
        lambda x: torch.stack([x, 2 * x], dim=3).view(2, 5, 8),
    ],
    ids=["never a row", "more images", "other features"],
)
def test_what_is_stacked_otherwise_stays(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 5, 4)
    gm = normalise(traced(function, x))
    assert "aten.stack.default" in spelled(gm)
    assert torch.equal(gm(x), function(x))


def test_normalise_keeps_a_copy_of_an_input() -> None:
    """The caller may write to what it gets back."""
    gm = traced(lambda x: x.clone(), torch.ones(2, 3))
    assert spelled(normalise(gm)) == spelled(gm)


def test_blocks_are_found_by_what_attention_adds_to() -> None:
    blocks = typed_graph(mark_blocks(traced(cls_head, *INPUTS)).graph).blocks
    assert [b.index for b in blocks] == [0, 1]
    assert all(b.refusal is None and b.site is not None and b.stream is not None for b in blocks)
    assert blocks[1].stream is blocks[0].site
    assert blocks[0].axis.prefix == 1
    assert blocks[0].axis.domain.grid.shape == (4, 3)


def attention(x: Tensor, qkv: Tensor) -> Tensor:
    """Return what attention over 13 tokens, with two heads, makes of them."""
    q, k, v = F.linear(x, qkv).reshape(2, 13, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 13, 8)


def test_a_parallel_branch_is_not_taken_for_the_residual() -> None:
    """x + (attention(x) + mlp(x)): the first addition joins two branches; the stream is shortened at the second."""

    def parallel(image: Tensor, embed: Tensor, qkv: Tensor, cls: Tensor) -> Tensor:
        x = stem(image, embed, cls)
        attended = attention(x, qkv)
        return (x + (attended + F.gelu(x)))[:, 0]

    gm = mark_blocks(traced(parallel, *INPUTS))
    (found,) = typed_graph(gm.graph).blocks
    assert found.site is node(gm, aten.add.Tensor, 1)
    assert found.stream is node(gm, aten.cat.default)


def test_attentions_that_are_added_one_after_the_other_have_one_site() -> None:
    """x + attention(x) + attention(x): tokens leave where both are added, by the first one's scores."""

    def parallel(image: Tensor, embed: Tensor, qkv: Tensor, cls: Tensor) -> Tensor:
        x = stem(image, embed, cls)
        both = [attention(y, qkv) for y in (x, x * 2)]
        x = x + both[0] + both[1]
        return (x + F.linear(F.gelu(x), qkv[:8])).mean(1)

    gm = mark_blocks(traced(parallel, *INPUTS))
    first, second = typed_graph(gm.graph).blocks
    assert first.site is node(gm, aten.add.Tensor, 1) and first.refusal is None
    assert first.stream is node(gm, aten.cat.default)
    assert second.site is None and second.refusal is not None
    assert "shares its residual add with a parallel attention" in second.refusal.reason


@pytest.mark.parametrize(
    "add_up",
    [
        lambda x, y, z, w: x + y + z + w,
        lambda x, y, z, w: x + z + y + w,
        lambda x, y, z, w: w + (x + (z + y)),
        lambda x, y, z, w: 0.5 * (x + 2 * y) + (0.5 * x - -(z + w)),
        lambda x, y, z, w: (x + y) + 0.5 * (2 * (z + w) - (x + y)) + 0.5 * (x + y),
    ],
    ids=["in a row", "between", "in brackets", "halves", "by a difference"],
)
def test_branches_beside_an_attention_are_added_before_tokens_leave(add_up: Callable[..., Tensor]) -> None:
    """x + attention(x) + mlp(x) + attention(x) in any order: tokens leave at the one sum of all."""

    def beside(image: Tensor, embed: Tensor, qkv: Tensor, cls: Tensor) -> Tensor:
        x = stem(image, embed, cls)
        both = [attention(y, qkv) for y in (x, x * 2)]
        return F.gelu(add_up(x, both[0], F.linear(F.gelu(x), qkv[:8]), both[1])).mean(1)

    gm = mark_blocks(traced(beside, *INPUTS))
    first, second = typed_graph(gm.graph).blocks
    assert first.site is not None and list(first.site.users) == [node(gm, aten.gelu.default, 1)]
    assert first.stream is node(gm, aten.cat.default) and first.refusal is None and second.site is None


def test_a_branch_that_reads_the_sum_comes_after_tokens_leave() -> None:
    """x + attention(x), and then an MLP of it; also where the sum is scaled before the MLP's result is added."""

    def in_turn(image: Tensor, embed: Tensor, qkv: Tensor, cls: Tensor) -> Tensor:
        x = stem(image, embed, cls)
        x = x + attention(x, qkv)
        return (0.5 * x + F.linear(F.gelu(x), qkv[:8])).mean(1)

    gm = mark_blocks(traced(in_turn, *INPUTS))
    (found,) = typed_graph(gm.graph).blocks
    assert found.site is node(gm, aten.add.Tensor, 0)


def test_attention_over_channels_or_to_other_tokens_is_no_block() -> None:
    def over_channels(image: Tensor, embed: Tensor, qkv: Tensor, cls: Tensor) -> Tensor:
        x = stem(image, embed, cls)
        q, k, v = F.linear(x, qkv).reshape(2, 13, 3, 2, 4).permute(2, 0, 3, 4, 1).unbind(0)
        return (x + F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2).reshape(2, 13, 8))[:, 0]

    def pooled(image: Tensor, embed: Tensor, qkv: Tensor, cls: Tensor) -> Tensor:
        x = stem(image, embed, cls)
        return F.scaled_dot_product_attention(cls.expand(2, -1, -1), x, x)[:, 0]

    for function in (over_channels, pooled):
        assert typed_graph(mark_blocks(traced(function, *INPUTS)).graph).blocks == ()


def test_liveness_counts_the_leading_tokens_that_are_read() -> None:
    gm = traced(cls_head, *INPUTS)
    live = live_tokens(infer_types(gm.graph))
    first, last = node(gm, aten.add.Tensor, 0), node(gm, aten.add.Tensor, 1)
    assert (live.needed[first], live.needed[last]) == (ALL, 1)
    attentions = [node(gm, aten.scaled_dot_product_attention.default, i) for i in (0, 1)]
    assert [live.computed[n] for n in attentions] == [ALL, 1]


def test_dead_tokens_are_dropped_exactly() -> None:
    gm = mark_blocks(normalise(traced(cls_head, *INPUTS)))
    split = split_projections(gm)
    propagate_shapes(split, "split_projections")
    dropped = drop_dead_tokens(split)
    propagate_shapes(dropped, "drop_dead_tokens")
    last = node(dropped, aten.scaled_dot_product_attention.default, 1)
    assert [tuple(arg.meta["val"].shape) for arg in last.args[:3]] == [(2, 2, 1, 4), (2, 2, 13, 4), (2, 2, 13, 4)]
    torch.testing.assert_close(dropped(*INPUTS), gm(*INPUTS), rtol=0, atol=1e-6)
    assert typed_graph(dropped.graph).blocks[1].dead


@torch.no_grad()
@pytest.mark.parametrize("live", [1, 2])
def test_few_live_tokens_are_projected_as_one_matrix(live: int) -> None:
    """The graph that Inductor gets: one product with a bias for each linear layer, no copy of the weight per image."""
    weight, bias = torch.randn(8, 8, generator=torch.Generator().manual_seed(4)), torch.linspace(-1, 1, 8)

    def model(image: Tensor, embed: Tensor, weight: Tensor, bias: Tensor, cls: Tensor) -> Tensor:
        x = torch.cat([cls.expand(2, live, -1), patches(image, embed)], dim=1)
        q, k = (F.linear(x, weight, bias).reshape(2, -1, 2, 4).transpose(1, 2) for _ in range(2))
        out = F.scaled_dot_product_attention(q, k, k).transpose(1, 2)
        return torch.stack([out[:, place] for place in range(live)])

    inputs = (IMAGE, EMBED, weight, bias, CLS)
    gm = normalise(traced(model, *inputs))
    dropped = drop_dead_tokens(gm)
    propagate_shapes(dropped, "drop_dead_tokens")
    attention = node(dropped, aten.scaled_dot_product_attention.default, 0)
    assert attention.args[0].meta["val"].shape == (2, 2, live, 4)
    torch.testing.assert_close(dropped(*inputs), gm(*inputs), rtol=0, atol=1e-5)
    opened = make_fx(dropped)(*inputs)
    assert [calls(opened, getattr(aten, name).default) for name in ("addmm", "mm", "bmm")] == [2, 0, 0]


def test_only_the_projection_whose_parts_differ_is_split() -> None:
    gm = normalise(traced(cls_head, *INPUTS))
    split = split_projections(gm)
    assert calls(gm, aten.linear.default) == 2
    assert calls(split, aten.linear.default) == 3, "q on its own, k and v together, in the last block only"
    torch.testing.assert_close(split(*INPUTS), gm(*INPUTS), rtol=0, atol=1e-6)


def test_whole_maps_keep_every_query() -> None:
    gm = mark_blocks(normalise(traced(cls_head, *INPUTS)))
    dropped = drop_dead_tokens(gm, needs_full_maps=True)
    propagate_shapes(dropped, "drop_dead_tokens")
    last = node(dropped, aten.scaled_dot_product_attention.default, 1)
    assert last.meta["val"].shape == (2, 2, 13, 4)
    torch.testing.assert_close(dropped(*INPUTS), gm(*INPUTS), rtol=0, atol=1e-6)


def test_pooled_heads_are_left_unchanged() -> None:
    gm = mark_blocks(normalise(traced(mean_head, *INPUTS)))
    for rewrite in (split_projections, drop_dead_tokens):
        assert spelled(rewrite(gm)) == spelled(gm)


def test_passes_never_touch_their_input() -> None:
    gm = traced(cls_head, *INPUTS)
    before = gm.print_readable(print_output=False), [dict(n.meta) for n in gm.graph.nodes]
    marked = mark_blocks(normalise(gm))
    drop_dead_tokens(split_projections(marked))
    assert (gm.print_readable(print_output=False), [dict(n.meta) for n in gm.graph.nodes]) == before


def test_stale_shapes_are_found_by_name() -> None:
    gm = traced(cls_head, *INPUTS)
    view = next(
        n for n in gm.graph.nodes if n.target in (aten.view.default, aten.reshape.default) and len(n.args[1]) == 5
    )
    set_args(view, (view.args[0], [2, 12, 3, 2, 4]))
    with pytest.raises(InconsistentGraph, match=view.name):
        propagate_shapes(gm, "a pass that forgot a size")
