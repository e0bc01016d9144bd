"""Each operator against a few lines of dense PyTorch, written from the method and not from the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gtp_fx.ops.attention import SCORES
from gtp_fx.ops.register import shapes_of
from gtp_fx.ops.token_graph import GRAPHS

ops = torch.ops.gtp_fx
GRID = [4, 3]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def qkv(tokens: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(random(2, 3, tokens, 8, seed=seed, scale=1.5) for seed in range(3))  # type: ignore[return-value]


def dense_map(q: Tensor, k: Tensor, bias: Tensor | None = None, sparsity: float = 1.0) -> Tensor:
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    attention = (logits if bias is None else logits + bias).softmax(-1)
    dropped = int(attention.shape[-1] ** 2 * (1 - sparsity))
    for one_head in attention.flatten(0, 1) if dropped else ():
        one_head[one_head < one_head.flatten().sort().values[dropped - 1]] = 0
    return attention


def dense_graph(x_BGC: Tensor, kind: str, neighbors: int) -> Tensor:
    """Â as a dense matrix [B, G, G], edge by edge."""
    batch, count, _ = x_BGC.shape
    adjacency = torch.zeros(batch, count, count)
    for image in range(batch):
        for i in range(count):
            cosine = torch.cosine_similarity(x_BGC[image, i][None], x_BGC[image], dim=-1)
            cosine[i] = -2
            if kind != "spatial":
                adjacency[image, i, cosine.topk(neighbors).indices] = 1
            for j in range(count):
                rows, columns = abs(i // GRID[1] - j // GRID[1]), abs(i % GRID[1] - j % GRID[1])
                if kind != "semantic" and max(rows, columns) == 1:
                    adjacency[image, i, j] = 1
    degree = adjacency.sum(-1)
    return adjacency * degree[:, :, None] ** -0.5 * degree[:, None, :] ** -0.5


@pytest.mark.parametrize("score", list(SCORES))
def test_scores_of_a_map_are_those_of_the_attention_that_has_it(score: str) -> None:
    q, k, v = qkv()
    wanted = ops.attention_with_scores(q, k, v, None, None, 1.0, score, 1, 2)[1]
    torch.testing.assert_close(ops.scores_of_map(dense_map(q, k), score, 1, 2), wanted)


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("sparsity", [1.0, 0.6])
def test_attention_with_scores(score: str, sparsity: float) -> None:
    q, k, v = qkv()
    bias = random(1, 1, 13, 13, seed=9)
    attention = dense_map(q, k, bias, sparsity)
    out, scores = ops.attention_with_scores(q, k, v, bias, None, sparsity, score, 1, 0)
    torch.testing.assert_close(out, attention @ v, rtol=1e-5, atol=1e-6)
    kind, over = score.split("-")
    pool = (lambda x: x.amax(1)) if over == "max" else (lambda x: x.mean(1))
    difficulty = pool(torch.diagonal(attention, dim1=-2, dim2=-1))[:, 1:]
    ability = pool(attention.sum(-2))[:, 1:]
    wanted = {
        "mixed": difficulty * ability,
        "regenerate": difficulty,
        "broadcast": ability,
        "cls": pool(attention[:, :, 0])[:, 1:],
    }
    torch.testing.assert_close(scores, wanted[kind], rtol=1e-5, atol=1e-6)


def test_attention_takes_a_boolean_mask_and_its_own_scale() -> None:
    q, k, v = qkv()
    mask = torch.ones(13, 13, dtype=torch.bool).tril()
    out, _ = ops.attention_with_scores(q, k, v, mask, 0.2, 1.0, "mixed-max", 1, 0)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


def test_keys_beside_the_tokens_take_part_in_the_softmax_and_not_in_the_scores() -> None:
    q, k, v = qkv()
    more = random(2, 3, 5, 8, seed=11), random(2, 3, 5, 8, seed=12)
    keys, values = (torch.cat([y[:, :, :2], x, y[:, :, 2:]], 2) for x, y in zip((k, v), more, strict=True))
    attention = dense_map(q, keys)
    for score, wanted in (("broadcast-mean", attention.sum(-2).mean(1)), ("cls-mean", attention[:, :, 0].mean(1))):
        out, scores = ops.attention_with_scores(q, keys, values, None, None, 1.0, score, 1, 0, 2, 3)
        torch.testing.assert_close(out, attention @ values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores, wanted[:, 3:15], rtol=1e-5, atol=1e-6)


def test_bfloat16_scores_are_those_of_its_rounded_operands() -> None:
    """Softmax and sums run in float32, so what is left is the rounding of q·k to 8 bits: under 2 % of a score."""
    low = [x.bfloat16() for x in qkv()]
    out, scores = ops.attention_with_scores(*low, None, None, 1.0, "mixed-max", 1, 0)
    wanted_out, wanted = ops.attention_with_scores(*[x.float() for x in low], None, None, 1.0, "mixed-max", 1, 0)
    assert (out.dtype, scores.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(scores, wanted, rtol=2e-2, atol=0)
    torch.testing.assert_close(out.float(), wanted_out, rtol=2e-2, atol=2e-2)


def test_select_splits_by_score_and_keeps_order() -> None:
    score = torch.tensor([[0.3, 0.1, 0.9, 0.2, 0.5], [5.0, 4.0, 3.0, 2.0, 1.0]])
    kept, propagated = ops.select(score, 2)
    assert kept.tolist() == [[0, 2, 4], [0, 1, 2]]
    assert propagated.tolist() == [[1, 3], [3, 4]]


def test_equal_scores_leave_from_the_back() -> None:
    kept, propagated = ops.select(torch.ones(1, 6), 2)
    assert (kept.tolist(), propagated.tolist()) == ([[0, 1, 2, 3]], [[4, 5]])


@pytest.mark.parametrize("kind", list(GRAPHS))
def test_propagation_weights_are_entries_of_the_normalised_adjacency(kind: str) -> None:
    x = random(2, 1 + 12, 8)
    near, inv_sqrt_degree = ops.token_graph(x, GRID, 1, kind, 3)
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(s)) for s in range(2)])
    kept, propagated = order[:, :7].sort(1).values, order[:, 7:].sort(1).values
    weights = ops.propagation_weights(near, inv_sqrt_degree, kept, propagated, GRID, kind)
    dense = dense_graph(x[:, 1:], kind, 3)
    for image in range(2):
        torch.testing.assert_close(weights[image], dense[image][kept[image]][:, propagated[image]])


def test_a_grid_of_three_sides_has_26_neighbours() -> None:
    _, inv_sqrt_degree = ops.token_graph(random(1, 27, 4), [3, 3, 3], 0, "spatial", 1)
    assert round(inv_sqrt_degree[0, 13].item() ** -2) == 26, "the centre"
    assert round(inv_sqrt_degree[0, 0].item() ** -2) == 7, "a corner"


def test_a_token_without_neighbours_gives_zero_and_not_infinity() -> None:
    near, inv_sqrt_degree = ops.token_graph(random(1, 1, 4), [1, 1], 0, "spatial", 1)
    assert near.shape == (1, 1, 0)
    assert inv_sqrt_degree.tolist() == [[0.0]]


def test_propagate_adds_a_share_of_what_leaves() -> None:
    x = random(1, 1 + 4, 2)
    weights = torch.tensor([[[0.5, 0.0], [0.25, 1.0]]])
    kept, propagated = torch.tensor([[0, 3]]), torch.tensor([[1, 2]])
    out = ops.propagate(x, weights, kept, propagated, 0.1, 1)[0]
    patches = x[0, 1:]
    torch.testing.assert_close(out[0], x[0, 0], msg="the prefix token is untouched")
    torch.testing.assert_close(out[1], patches[0] + 0.1 * 0.5 * patches[1])
    torch.testing.assert_close(out[2], patches[3] + 0.1 * (0.25 * patches[1] + patches[2]))


def test_key_bias_is_the_log_scale_behind_the_prefix() -> None:
    scale = torch.tensor([[1.0, 2.0, 4.0]])
    bias = ops.key_bias(scale, 2, 0, None, torch.zeros(1))
    torch.testing.assert_close(bias, torch.tensor([0.0, 0.0, 1.0, 2.0, 4.0]).clamp(min=1).log()[None, None, None])
    mask = torch.tensor([[[[True, False, True, True, True]]]])
    both = ops.key_bias(scale, 2, 0, mask, torch.zeros(1))
    assert both[..., 1].item() == float("-inf")
    assert both[..., 4].item() == pytest.approx(torch.tensor(4.0).log().item())


def test_suffix_tokens_are_neither_scored_nor_moved() -> None:
    q, k, v = qkv(15)
    _, with_suffix = ops.attention_with_scores(q, k, v, None, None, 1.0, "mixed-max", 1, 2)
    _, all_behind = ops.attention_with_scores(q, k, v, None, None, 1.0, "mixed-max", 1, 0)
    torch.testing.assert_close(with_suffix, all_behind[:, :-2])
    x = random(1, 1 + 4 + 2, 3)
    kept, propagated = torch.tensor([[0, 3]]), torch.tensor([[1, 2]])
    out = ops.propagate(x, torch.ones(1, 2, 2), kept, propagated, 0.1, 1)
    torch.testing.assert_close(out[:, [0, 3, 4]], x[:, [0, 5, 6]])
    assert ops.key_bias(torch.full((1, 3), 2.0), 1, 2, None, x)[0, 0, 0].gt(0).tolist() == [
        False,
        *[True] * 3,
        False,
        False,
    ]


def test_taking_tokens_keeps_prefix_and_suffix() -> None:
    table = random(1 + 6 + 2, 4)  # one for all images, as a rotary table is
    index = torch.tensor([[0, 2, 5], [1, 2, 3]])
    taken = ops.take_tokens(table[None, None], index, 0, 2, 1, 2)
    assert taken.shape == (2, 1, 6, 4)
    for image in range(2):
        rows = [0, *(1 + index[image]).tolist(), 7, 8]
        assert torch.equal(taken[image, 0], table[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_in_channels_are_the_mask_on_the_logits(dtype: torch.dtype) -> None:
    """Half precision holds log s to 2^-16, where the mask itself is rounded to 2^-9; a key of scale 0 is not seen."""
    q, k, v = (x.to(dtype) for x in qkv())
    scale_BN = random(2, 11).mul(3).exp()
    scale_BN[0, 4] = 0.0
    wide_q, wide_k = ops.scale_channels(q, k, scale_BN, 1, 1, 0.3)
    mask = ops.key_bias(scale_BN, 1, 1, None, scale_BN)
    product = 0.3 * (wide_q[..., 8:].float() @ wide_k[..., 8:].float().transpose(-2, -1))
    seen = mask.isfinite().expand_as(product)
    torch.testing.assert_close(product[seen], mask.expand_as(product)[seen], rtol=2**-16, atol=0)
    attended = torch.nn.functional.scaled_dot_product_attention(wide_q.float(), wide_k.float(), v.float(), scale=0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask, scale=0.3
    )
    torch.testing.assert_close(attended, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("graded", [False, True])
def test_stock_attention_returns_its_log_sum_exp(graded: bool) -> None:
    """Also where its mask wants a gradient, which the kernel that returns it hasn't got."""
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = random(2, 1, 1, 13).requires_grad_(graded)
    out, lse = ops.attention_with_lse(q, k, v, mask, 0.3, "cpu")
    logits = 0.3 * q @ k.transpose(-2, -1) + mask
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    wanted = logits.softmax(-1) @ v
    torch.testing.assert_close(out, wanted)
    inputs = [q, k, v, *([mask] if graded else [])]
    pairs = zip(*(torch.autograd.grad(one.square().sum(), inputs) for one in (out, wanted)), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
    torch.library.opcheck(ops.attention_with_lse.default, (q, k, v, mask, 0.3, "cpu"))


def test_recovering_puts_kept_tokens_back_and_the_others_as_the_mean_of_who_received_them() -> None:
    x = random(2, 5, 2 + 3 + 1, 4)  # [R, B = 5, tokens, C]: any dimension may be the images'
    kept, propagated = torch.tensor([[0, 2, 4]] * 5), torch.tensor([[1, 3, 5]] * 5)
    weights = torch.zeros(5, 3, 3)
    weights[:, 0, 0], weights[:, 1, 0] = 0.3, 0.1  # the first one went to two, the second nowhere, the third to one
    weights[:, 2, 2] = 0.2
    shares = ops.recovery_weights(weights, kept, propagated, [2, 3])
    back = ops.recover(x, shares, kept, propagated, 1, 2, 2, 1)
    assert back.shape == (2, 5, 2 + 6 + 1, 4)
    torch.testing.assert_close(back[:, :, [0, 1, 2, 4, 6, 8]], x)
    patches = x[:, :, 2:5]
    torch.testing.assert_close(back[:, :, 3], 0.75 * patches[:, :, 0] + 0.25 * patches[:, :, 1])
    torch.testing.assert_close(back[:, :, 5], patches[:, :, 0], msg="number 3 is below 0 on a grid of 2 x 3")
    torch.testing.assert_close(back[:, :, 7], patches[:, :, 2])


def test_recovering_where_nothing_left_changes_nothing() -> None:
    x = random(2, 7, 4)
    kept, nobody = torch.arange(6).expand(2, 6), torch.zeros(2, 0, dtype=torch.int64)
    shares = ops.recovery_weights(torch.zeros(2, 6, 0), kept, nobody, [2, 3])
    assert torch.equal(ops.recover(x, shares, kept, nobody, 0, 1, 1, 0), x)


def test_a_branch_gives_nothing_to_tokens_that_skipped_it() -> None:
    x = random(2, 1 + 3 + 1, 4)
    kept, skipped = torch.tensor([[0, 2, 4], [1, 2, 3]]), torch.tensor([[1, 3, 5], [0, 4, 5]])
    whole = ops.idle(x, torch.zeros(1, 6, 2, dtype=torch.int64), kept, skipped, 1, 1)
    assert torch.equal(whole[0, [0, 1, 3, 5, 7]], x[0]) and torch.equal(whole[1, [0, 2, 3, 4, 7]], x[1])
    assert not whole[0, [2, 4, 6]].any() and not whole[1, [1, 5, 6]].any()


def test_a_branch_gives_a_share_of_its_patches_mean() -> None:
    """The tokens around them aren't in it, and where there is padding that isn't either."""
    x = random(2, 1 + 3 + 1, 4)
    kept, skipped = torch.tensor([[0, 2, 4], [1, 2, 3]]), torch.tensor([[1, 3, 5], [0, 4, 5]])
    places = torch.zeros(2, 6, 2, dtype=torch.int64)
    places[1, 2:4] = -5
    whole = ops.idle(x, places, kept, skipped, 1, 1, 0.5, False)
    assert torch.equal(whole[0, [0, 1, 3, 5, 7]], x[0]) and torch.equal(whole[1, [0, 2, 3, 4, 7]], x[1])
    torch.testing.assert_close(whole[0, [2, 4, 6]], 0.5 * x[0, 1:4].mean(dim=0).expand(3, -1))
    torch.testing.assert_close(whole[1, [1, 5, 6]], 0.5 * x[1, 1:4].mean(dim=0).expand(3, -1))
    inside = ops.idle(x, places, kept, skipped, 1, 1, 0.5, True)
    torch.testing.assert_close(inside[0], whole[0])
    torch.testing.assert_close(inside[1, [1, 5, 6]], 0.5 * x[1, 1].expand(3, -1), msg="patches 2 and 3 are padding")
    nowhere = ops.idle(x, torch.full_like(places, -5), kept, skipped, 1, 1, 0.5, True)
    assert not nowhere[0, [2, 4, 6]].any()


def arguments() -> dict[str, tuple[Any, ...]]:
    """One call of each operator, with gradients where they flow."""
    x = random(2, 13, 8).requires_grad_()
    q, k, v = (t.requires_grad_() for t in qkv())
    near, inv_sqrt_degree = ops.token_graph(x.detach(), GRID, 1, "mixed", 3)
    scores = random(2, 12).abs()
    kept, propagated = ops.select(scores, 4)
    weights = ops.propagation_weights(near, inv_sqrt_degree, kept, propagated, GRID, "mixed")
    return {
        "attention_with_scores": (q, k, v, None, None, 1.0, "mixed-max", 1, 0),
        "scores_of_map": (random(2, 3, 13, 13), "mixed-max", 1, 2),
        "key_bias": (scores + 1, 1, 0, random(1, 3, 13, 13), x),
        "scale_channels": (q, k, scores + 1, 1, 0, 0.3),
        "select": (scores, 4),
        "token_graph": (x, GRID, 1, "mixed", 3),
        "propagation_weights": (near, inv_sqrt_degree, kept, propagated, GRID, "mixed"),
        "propagate": (x, weights, kept, propagated, 0.1, 1),
        "weighted_mean": (x, scores + 1, 0, 1, 1, 0, True),
        "take_tokens": (x[None], kept, 1, 2, 1, 0),
        "recovery_weights": (weights, kept, propagated, GRID),
        "attended_shares": (q, k[:, :, :9], propagated, 1, 0),
        "idle": (x[:, :9], torch.zeros(1, 12, 2, dtype=torch.int64), kept, propagated, 1, 0),
        "recover": (x[:, :9], ops.recovery_weights(weights, kept, propagated, GRID), kept, propagated, 0, 1, 1, 0),
    }


@pytest.mark.parametrize("name", list(arguments()))
def test_opcheck(name: str) -> None:
    """torch's own examination: schema, fake tensors, autograd registration, tracing with dynamic shapes."""
    torch.library.opcheck(getattr(ops, name).default, arguments()[name])


@pytest.mark.parametrize("name", list(arguments()))
def test_stated_shapes_are_the_true_ones(name: str) -> None:
    shapes: Callable[..., Any] | None = shapes_of(getattr(ops, name).default)
    assert shapes is not None
    args = arguments()[name]

    def forms(value: Tensor | tuple[Tensor, ...]) -> list[Any]:
        return [(t.shape, t.dtype, t.stride()) for t in ([value] if isinstance(value, Tensor) else value)]

    assert forms(shapes(*args)) == forms(getattr(ops, name)(*args))


def test_gradients_reach_queries_keys_values_and_tokens() -> None:
    args = arguments()
    out, scores = ops.attention_with_scores(*args["attention_with_scores"])
    (out.sum() + scores.sum() + ops.propagate(*args["propagate"]).sum()).backward()
    for tensor in (*args["attention_with_scores"][:3], args["propagate"][0]):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("received", [True, False])
def test_a_stand_in_received_most_or_is_nearest(received: bool) -> None:
    """Of 12 patches on a grid of 4 x 3 nine are left before the site, which keeps five of those."""
    index = torch.tensor([[0, 1, 2, 4, 5, 7, 8, 10, 11]]).expand(2, -1)
    kept, removed = torch.tensor([[0, 3, 4, 6, 8], [1, 2, 5, 7, 8]]), torch.tensor([[1, 2, 5, 7], [0, 3, 4, 6]])
    weights = random(2, 5, 4, seed=3).relu() * torch.tensor([1.0, 0.0, 1.0, 1.0])  # nobody receives the second one
    found = ops.stand_ins(weights if received else None, kept, removed if received else None, index, GRID)
    assert found.shape == shapes_of(ops.stand_ins.default)(weights, kept, removed, index, GRID).shape  # type: ignore[misc]
    for image in range(2):
        for number in range(9):
            here = divmod(int(index[image, number]), GRID[1])
            if number in kept[image]:
                wanted = int((kept[image] == number).nonzero())
            else:
                shares = weights[image, :, int((removed[image] == number).nonzero())]
                places = [divmod(int(index[image, k]), GRID[1]) for k in kept[image]]
                distances = [(row - here[0]) ** 2 + (column - here[1]) ** 2 for row, column in places]
                most = received and float(shares.max()) > 0
                wanted = int(shares.argmax()) if most else distances.index(min(distances))
            assert int(found[image, number]) == wanted
