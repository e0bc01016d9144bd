"""Work of GTP: of the token graph, once a stream, and of a site, as operators or as GTP's kernels."""

from __future__ import annotations

import torch

from gtp_fx.strategies.pricing import FLOAT, kernel_scoring_works, rows_moved, scoring_works
from gtp_fx.strategies.sites import SiteShape
from gtp_fx.targets.work import Work


def graph_works(
    graph: str, neighbors: int, patches: int, channels: int, images: int, dtype: str, kernels: bool
) -> list[Work]:
    """Price the cosine similarity of every pair of patches and the search for its largest entries.

    A spatial graph needs coordinates only.
    """
    if graph == "spatial":
        return [Work("stream", bytes=FLOAT * patches * patches)]
    pairs = images * patches * patches
    if kernels:  # similarities are ranked in registers, and never written
        read = getattr(torch, dtype).itemsize * images * patches * channels
        product = Work("product", 2 * pairs * channels, read, patches, patches, images, dtype=dtype, launches=0)
        return [product, Work("neighbors", bytes=FLOAT * pairs * neighbors)]
    similarity = Work("product", 2 * pairs * channels, FLOAT * pairs, patches, patches, images)
    return [similarity, Work("sort", bytes=FLOAT * pairs), Work("stream", bytes=2 * FLOAT * pairs)]


def propagation_works(score: str, graph: str, neighbors: int, site: SiteShape, scales_read: bool) -> list[Work]:
    """Price a site: tokens are scored and chosen, and those that go are propagated."""
    removed = site.patches_in - site.patches_out
    if site.kernels:
        return _in_kernels(score, graph, neighbors, site)
    tokens_in, tokens_out = site.others + site.patches_in, site.others + site.patches_out
    features = 2 * tokens_out * removed * site.channels
    scales = 2 * site.patches_out * removed if scales_read else 0
    edges = site.patches_out * removed * (1 if graph == "spatial" else neighbors)
    return [
        *scoring_works(score, site.heads, tokens_in, tokens_in, site.images, site.dtype),
        Work("sort", bytes=site.images * FLOAT * site.patches_in),
        Work("stream", bytes=site.images * FLOAT * edges, launches=2),
        Work("gather", site.images * (features + scales), rows_moved(site), launches=3),
    ]


def _in_kernels(score: str, graph: str, neighbors: int, site: SiteShape) -> list[Work]:
    """Price a site as GTP's kernels run it.

    The propagation kernel also does the residual add and the norm. These are counted where the original graph has
    them.
    """
    tokens_out = site.others + site.patches_out
    candidates = (0 if graph == "semantic" else 9) + (0 if graph == "spatial" else neighbors)
    return [
        *kernel_scoring_works(score, site),
        Work("sort", bytes=site.images * FLOAT * site.patches_in),
        # A row reads each candidate's index, place and degree.
        Work("gather", bytes=site.images * tokens_out * candidates * 3 * FLOAT, launches=0),
    ]
