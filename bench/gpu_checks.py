"""Is every kernel right on this GPU? Each against the operator it stands for, on random inputs, its outputs' memory poisoned.

The sizes are models' own. Tolerances are of the largest value: the order of sums in float32, rounding of weights and outputs below
(the kernels' docstrings argue them).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import gtp_fx, gtp_fx_kernels  # type: ignore[import-not-found]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Sizes:
    """What is checked: (images, heads, tokens, head size, image's side in patches) of attention, (images, side, channels,
    leaving) of sites, (images, windows a side, window's side, channels, leaving) of windows."""

    attention: tuple[tuple[int, int, int, int], ...]
    sites: tuple[tuple[int, int, int, int], ...]
    windows: tuple[tuple[int, int, int, int, int], ...]


MODELS = Sizes(
    attention=(
        (8, 6, 197, 64),
        (4, 12, 256, 32),
        (2, 16, 577, 64),
        (1, 12, 1370, 64),
        (64, 3, 49, 32),
        (1, 16, 730, 80),
    ),
    sites=((8, 14, 384, 16), (2, 24, 1024, 60), (1, 37, 768, 200)),
    windows=((4, 8, 7, 96, 12), (1, 1, 64, 768, 1000)),
)
DRY = Sizes(attention=((1, 2, 37, 32), (1, 1, 280, 16)), sites=((2, 5, 24, 4),), windows=((1, 2, 4, 16, 5),))


@dataclass(frozen=True)
class Check:
    """error: the largest difference over the largest value; NaN where a kernel left poison."""

    kernel: str
    case: str
    dtype: str
    error: float
    tolerance: float

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def run_checks(device: torch.device, sizes: Sizes = MODELS) -> Iterator[Check]:
    """Every kernel at every size in every dtype. `gtp_fx.kernels.available.load_kernels` has registered them."""
    for dtype in TOLERANCE:
        random = _randoms(device, dtype)
        for size in sizes.attention:
            yield from _attention(random, dtype, size)
        for site in sizes.sites:
            yield from _site(random, dtype, site)
        for windows in sizes.windows:
            yield from _windows(random, dtype, windows)


Random = Callable[..., Tensor]


def _randoms(device: torch.device, dtype: torch.dtype) -> Random:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, whole: bool = False) -> Tensor:
        """whole: in float32, as scores and scales are."""
        return torch.randn(*shape, generator=generator).to(device, torch.float32 if whole else dtype)

    return random


def _attention(random: Random, dtype: torch.dtype, size: tuple[int, int, int, int]) -> Iterator[Check]:
    images, heads, tokens, head = size
    q, k, v = random(images, tokens, 3, heads, head).permute(2, 0, 3, 1, 4)
    scales = random(images, tokens - 1, whole=True).exp()
    for name, bias in (("", None), (", bias", random(1, heads, tokens, tokens))):
        with _poisoned():
            out, scores = gtp_fx_kernels.attend(q, k, v, bias, scales, None, None, "mixed-max", 1, 0, [])
        wide = [x.float() for x in (q, k, v)]
        told = gtp_fx.key_bias(scales, 1, 0, None if bias is None else bias.float(), wide[0])
        wanted, ranks = gtp_fx.attention_with_scores(*wide, told, None, 1.0, "mixed-max", 1, 0)
        yield _check("attend", f"{size}{name}", dtype, out, wanted)
        yield _check("attend's scores", f"{size}{name}", torch.float32, scores, ranks)


def _site(random: Random, dtype: torch.dtype, size: tuple[int, int, int, int]) -> Iterator[Check]:
    """Two in a row: the second on what the first left."""
    images, side, channels, leaving = size
    cells, grid = side * side, [side, side]
    x, weight, bias = random(images, 1 + cells, channels), random(channels), random(channels)
    near, degree = gtp_fx.token_graph(x, grid, 1, "mixed", 8)
    index = torch.arange(cells, device=x.device).expand(images, cells)
    place = scales = None
    for _ in range(2):
        score = random(images, index.shape[1], whole=True)
        score[:, ::3] = score[:, :1]  # ties
        with _poisoned():
            *chosen, place = gtp_fx_kernels.select(score, place, leaving, cells)
        kept, gone = gtp_fx.select(score, leaving)
        wanted = (kept, gone, index.gather(1, kept), index.gather(1, gone))
        wrong = sum(int((found != right).sum()) for found, right in zip(chosen, wanted, strict=True))
        yield Check("select", str(size), "int64", float(wrong), 0.0)
        with _poisoned():
            shorter, moved, normed = gtp_fx_kernels.propagate(
                x, None, near, degree, *chosen, place, scales, weight, bias, grid, "mixed", 0.3, 1, 1e-6, True, []
            )
        weights = gtp_fx.propagation_weights(near, degree, *wanted[2:], grid, "mixed")
        before = torch.ones_like(score) if scales is None else scales
        after = gtp_fx.propagate(before[..., None], weights, kept, gone, 0.3, 0)[..., 0]
        right = gtp_fx.propagate(x.float(), weights, kept, gone, 0.3, 1)
        norm = F.layer_norm(shorter.float(), (channels,), weight.float(), bias.float(), 1e-6)
        yield _check("propagate", str(size), dtype, shorter, right)
        yield _check("propagate's scales", str(size), torch.float32, moved, after)
        yield _check("propagate's norm", str(size), dtype, normed, norm)
        shares = gtp_fx.recovery_weights(weights, *wanted[2:], grid)
        residual = random(*x.shape)
        with _poisoned():
            whole = gtp_fx_kernels.recover(shorter, shares, None, residual, kept, gone, 1, 0)
        back = gtp_fx.recover(shorter.float(), shares, kept, gone, 0, 1, 1, 0) + residual.float()
        yield _check("recover", str(size), dtype, whole, back)
        x, index, scales = shorter, wanted[2], moved


def _windows(random: Random, dtype: torch.dtype, size: tuple[int, int, int, int, int]) -> Iterator[Check]:
    images, across, side, channels, leaving = size
    places = gtp_fx.grid_places([across * side, across * side], random(1))[0]
    places = places.reshape(across, side, across, side, 2).transpose(1, 2).reshape(across**2, side**2, 2)
    count = images * across**2
    with _poisoned():
        kept, left, *_ = gtp_fx_kernels.select(random(count, side**2, whole=True), None, leaving, side**2)
    x = random(count, side**2 - leaving, channels)
    with _poisoned():
        found = gtp_fx_kernels.recover(x, None, places, None, kept, left, 0, 0)
    wanted = gtp_fx.recover(x.float(), gtp_fx.region_shares(places, kept, left), kept, left, 0, 1, 0, 0)
    yield _check("recover in windows", str(size), dtype, found, wanted)


def _check(kernel: str, case: str, dtype: torch.dtype, found: Tensor, wanted: Tensor) -> Check:
    error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    return Check(kernel, case, str(dtype).removeprefix("torch."), float(error), TOLERANCE[dtype])


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """What `empty` makes holds NaN, or the largest integer, until somebody writes it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
