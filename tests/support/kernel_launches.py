"""Every launch that the kernels' operators make: what the nets ask for, and what is awkward. Tensors are never filled.

A family is a function that yields launches: what is special about one, and what makes it with whatever `launcher` the
kernels' modules have then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

HALF, SINGLE = torch.bfloat16, torch.float32
Launch = tuple[str, Callable[[], Any]]


def attend_launches() -> Iterator[Launch]:
    """Of the nets' streams, some tokens gone and none: that scores, that is told scales, and both."""
    from gtp_fx.kernels.attention import attend

    for tokens in (127, 197, 577):
        q, k, v = torch.empty(2, tokens, 3, 2, 64, dtype=HALF).permute(2, 0, 3, 1, 4)
        scales = torch.empty(2, tokens - 1)
        for name, told, score in (
            ("scored", None, "mixed-max"),
            ("told", scales, "none"),
            ("both", scales, "mixed-max"),
        ):
            call = (q, k, v, None, told, None, score, 1, 0, [])
            yield f"{tokens}-{name}", lambda call=call: attend._init_fn(*call)


def scores_launches() -> Iterator[Launch]:
    """Of the nets' streams; told scales where one of them is."""
    from gtp_fx.kernels.scores import attention_scores

    for tokens in (197, 577, 1370):
        q, k, _ = torch.empty(2, tokens, 3, 2, 64, dtype=HALF).permute(2, 0, 3, 1, 4)
        told = torch.empty(2, tokens - 1) if tokens == 197 else None
        call = (q, k, torch.empty(2, 2, tokens), None, "mixed-max", 1, 0, told)
        yield str(tokens), lambda call=call: attention_scores._init_fn(*call)


def token_graph_launches() -> Iterator[Launch]:
    """Of the nets' grids, at batches that fill a GPU."""
    from gtp_fx.kernels.token_graph import token_graph

    for images, side, channels in ((48, 14, 384), (48, 24, 1024), (8, 37, 768)):
        x = torch.empty(images, 1 + side * side, channels, dtype=HALF)
        yield f"{side}-{channels}", lambda x=x, side=side: token_graph._init_fn(x, [side, side], 1, "mixed", 8)


def select_launches() -> Iterator[Launch]:
    """Of all cells of a grid, and of some of the nets' grids."""
    from gtp_fx.kernels.select import select

    yield "196-whole", lambda: select._init_fn(torch.empty(2, 196), None, 20, 196)
    for cells in (196, 576, 1369):
        call = (torch.empty(2, cells - 46), torch.empty(2, cells, dtype=torch.int32), 20, cells)
        yield str(cells), lambda call=call: select._init_fn(*call)


def propagate_launches() -> Iterator[Launch]:
    """By width and graph, with all that they may be asked for: a residual, scales, a norm; and LayerScale."""
    for channels in (384, 768):  # as 768, 1024 channels fill a row of 1024
        for kind in ("mixed", "spatial"):
            yield f"{channels}-{kind}", _propagate(channels, kind)
        yield f"{channels}-gain", _propagate(channels, gain=True)


def recover_launches() -> Iterator[Launch]:
    from gtp_fx.kernels.recover import recover

    kept, left = (torch.empty(2, size, dtype=torch.int64) for size in (130, 20))
    x, shares = torch.empty(2, 151, 384, dtype=HALF), torch.empty(2, 20, 130)
    yield "image", lambda: recover._init_fn(x[:, 20:], shares, None, x, kept, left, 1, 0)


def awkward_attend_launches() -> Iterator[Launch]:
    """Other sizes and dtypes, a bias, one query; and where one is all there is of something, a constant to Triton."""
    from gtp_fx.kernels.attention import attend

    for tokens, head, dtype in ((49, 32, HALF), (4096, 80, HALF), (197, 64, SINGLE), (4096, 80, SINGLE)):
        q, k, v = torch.empty(2, tokens, 3, 2, head, dtype=dtype).permute(2, 0, 3, 1, 4)
        bias = torch.empty(1, 2, tokens, tokens, dtype=dtype) if tokens == 49 else None
        call = (q, k, v, bias, torch.empty(2, tokens - 1), None, "mixed-max", 1, 0, [])
        yield f"{tokens}-{head}-{dtype}", lambda call=call: attend._init_fn(*call)
    q, k, v = torch.empty(1, 30, 3, 1, 64, dtype=HALF).permute(2, 0, 3, 1, 4)
    seen, told = torch.ones(1, 1, 1, 30, dtype=torch.bool), torch.empty(1, 29)
    added = torch.empty(1, 1, 30, 30, dtype=HALF)
    for name, bias, scales, score, tile in (
        ("cls", seen, None, "cls-max", []),
        ("tiled-cls", seen, told, "cls-max", [64, 16, 4, 2]),
        ("tiled-bias", added, told, "mixed-max", [64, 64, 4, 2]),
        ("one-query", seen, told, "none", []),
    ):
        asking = q[:, :, :1] if score == "none" else q
        call = (asking, k, v, bias, scales, None, score, 1, 0, tile)
        yield name, lambda call=call: attend._init_fn(*call)


def awkward_scores_launches() -> Iterator[Launch]:
    """Another head size, one query that counts; one image, one head."""
    from gtp_fx.kernels.scores import attention_scores

    q, k, _ = torch.empty(2, 197, 3, 2, 80, dtype=HALF).permute(2, 0, 3, 1, 4)
    yield "80", lambda: attention_scores._init_fn(q, k, torch.empty(2, 2, 197), None, "broadcast-mean", 1, 0, None)
    lone = (q[:1, :1, :30], k[:1, :1, :30], torch.empty(1, 1, 30), 0.125, "cls-max", 1, 0, None)
    yield "cls", lambda: attention_scores._init_fn(*lone)


def awkward_token_graph_launches() -> Iterator[Launch]:
    """More neighbours, a volume, few cells, float32."""
    from gtp_fx.kernels.token_graph import token_graph

    for images, grid, channels, neighbors, kind, dtype in (
        (8, [37, 37], 768, 16, "semantic", torch.float16),
        (1, [4, 8, 8], 1280, 8, "mixed", HALF),
        (2, [24, 24], 1024, 8, "mixed", SINGLE),
    ):
        x = torch.empty(images, 1 + torch.Size(grid).numel(), channels, dtype=dtype)
        call = (x, grid, 1, kind, neighbors)
        yield f"{grid}-{dtype}", lambda call=call: token_graph._init_fn(*call)


def awkward_site_launches() -> Iterator[Launch]:
    """Yield volumes, windows, no prefix, no norm, a single token, other widths, and the tiles that tuning times."""
    from gtp_fx.kernels.propagate import propagate
    from gtp_fx.kernels.recover import recover
    from gtp_fx.kernels.select import select
    from gtp_fx.kernels.tiles import propagation_tiles

    yield "one", lambda: select._init_fn(torch.empty(1, 150), None, 149, 150)
    for channels in (192, 768, 1280):
        for tile in propagation_tiles(channels):
            yield f"{channels}-{tile.rows}x{tile.warps}", _propagate(channels, tile=tile.arguments)
    x, places = torch.empty(2, 151, 384, dtype=HALF), torch.empty(2, 150, 2, dtype=torch.int64)
    near, degree, place = torch.empty(2, 196, 8), torch.empty(2, 196), torch.empty(2, 196, dtype=torch.int32)
    kept, left, one = (torch.empty(2, size, dtype=torch.int64) for size in (130, 20, 1))
    deep = (None, None, None, [4, 7, 7], "spatial", 0.1, 0, -1.0, False, [])
    few = (near[..., :0].long(), degree, one, one, one, one, place)
    yield "deep", lambda: propagate._init_fn(x[:, :3], None, *few, *deep)
    similar = (near.int(), degree, kept, left, kept, left, place, None, x[0, 0], None, [196], "semantic", 0.1, 1)
    yield "similar", lambda: propagate._init_fn(x, None, *similar, 1e-6, True, [])
    yield "windows", lambda: recover._init_fn(x[:, 21:], None, places, None, kept, left, 0, 0)
    yield "one", lambda: recover._init_fn(x[:, :1], None, places[:1, :2], x[:, :2], one, one, 0, 0)


def _propagate(channels: int, kind: str = "mixed", gain: bool = False, tile: Sequence[int] = ()) -> Callable[[], Any]:
    """A site of 150 of 14 x 14 patches, of which 20 leave."""
    from gtp_fx.kernels.propagate import propagate

    near, degree, scales = torch.empty(2, 196, 8, dtype=torch.int32), torch.empty(2, 196), torch.empty(2, 150)
    kept, left = (torch.empty(2, size, dtype=torch.int64) for size in (130, 20))
    x, place = torch.empty(2, 151, channels, dtype=HALF), torch.empty(2, 196, dtype=torch.int32)
    told = (near, degree, kept, left, kept, left, place, scales, x[0, 0], x[0, 0], [14, 14], kind, 0.1, 1, 1e-6, True)
    return lambda: propagate._init_fn(x, x.clone(), *told, list(tile), x[0, 0] if gain else None)


NETS = (attend_launches, scores_launches, token_graph_launches, select_launches, propagate_launches, recover_launches)
"""What DeiT-S, DeiT-B, ViT-L of 384 pixels and DINOv2-B ask for."""
AWKWARD = (
    awkward_attend_launches,
    awkward_scores_launches,
    awkward_token_graph_launches,
    awkward_site_launches,
)
