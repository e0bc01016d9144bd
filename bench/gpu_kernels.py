"""Times of the kernels, each beside its alternatives.

The contenders of a row run interleaved, each several times in a row. On a GPU these repeats are one CUDA graph, so that
no launch from Python is timed. Reported is the median over rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import gtp_fx, gtp_fx_kernels  # type: ignore[import-not-found]

from bench.gpu_stock import kernel_taken, log_sum_exps, stock_attention
from gtp_fx.measure.site_probes import propagation, stream_pass
from gtp_fx.measure.timing import clock_for, interleave

_COPIED = 2**28
"""Bytes of a copy: more than any cache holds."""
_NEIGHBORS = 8


@dataclass(frozen=True)
class KernelSizes:
    """Sizes to time.

    attention: (images, heads, tokens, features per head).
    streams: (images, patches, channels, removed tokens).
    images: (images, side in pixels, side of a patch, channels).
    copied: bytes of the copy.
    """

    attention: tuple[tuple[int, ...], ...]
    streams: tuple[tuple[int, ...], ...]
    images: tuple[tuple[int, ...], ...]
    copied: int


NETS = KernelSizes(
    attention=((256, 6, 197, 64), (256, 12, 197, 64), (64, 16, 577, 64), (32, 12, 1370, 64)),
    streams=((256, 196, 384, 16), (256, 196, 768, 18), (64, 576, 1024, 46), (32, 1369, 768, 82)),
    images=((256, 224, 16, 384), (256, 224, 16, 768), (64, 384, 16, 1024), (32, 518, 14, 768)),
    copied=_COPIED,
)
DRY = KernelSizes(((1, 1, 20, 16),), ((2, 20, 16, 4),), ((1, 28, 14, 16),), 4096)

Made = tuple[dict[str, Callable[[], object]], dict[str, int]]
"""Contenders by name, and the bytes that they move."""


@dataclass(frozen=True)
class KernelRow:
    """Times of one kernel and its alternatives at one size.

    kernel: name of the row.
    size: one of `KernelSizes`.
    seconds: time of one run, by contender.
    moved: least bytes read and written, by contender, for those bound by memory.
    failed: error messages of contenders that raised, by contender.
    """

    kernel: str
    size: tuple[int, ...]
    seconds: Mapping[str, float]
    moved: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A row whose contenders are compiled, but not timed yet.

    kernel: name of the row.
    size: one of `KernelSizes`.
    runs: working contenders; a call runs one `repeats` times.
    moved: as in `KernelRow`.
    failed: as in `KernelRow`.
    """

    kernel: str
    size: tuple[int, ...]
    runs: Mapping[str, Callable[[], object]]
    moved: Mapping[str, int]
    failed: Mapping[str, str]

    def answer(self, device: torch.device, rounds: int) -> KernelRow:
        """Time the contenders and return the row, with medians over rounds."""
        seconds: dict[str, float] = {}
        if self.runs:
            timings = interleave(self.runs, rounds=rounds, clock=clock_for(device))
            seconds = {name: timings.spread(name).median / repeats(device) for name in self.runs}
        return KernelRow(self.kernel, self.size, seconds, self.moved, self.failed)


def questions(what: str, device: torch.device, dtype: torch.dtype, sizes: KernelSizes) -> Iterator[Question]:
    """Yield the rows of "attention", or all others for any other `what`, with all contenders compiled.

    The kernels have to be registered before.
    """
    rows: list[tuple[str, Any, Callable[..., Made]]]
    if what == "attention":
        rows = [("attention", size, attention) for size in sizes.attention]
    else:
        rows = [("copy", (sizes.copied,), _copy)]
        kernels = (("graph", _graph), ("propagate", _propagate), ("select", _select))
        rows += [(name, size, make) for size in sizes.streams for name, make in kernels]
        rows += [("patch embedding", size, _embedding) for size in sizes.images]
    for kernel, size, make in rows:
        yield question(kernel, size, make(size, device, dtype), device)


def question(kernel: str, size: tuple[int, ...], made: Made, device: torch.device) -> Question:
    """Compile the contenders of a row, and note those that raise."""
    runs, moved = made
    ready, failed = {}, {}
    for name, run in runs.items():
        try:
            run()  # compiles
            ready[name] = _repeated(run, device)
        except Exception as error:  # of one contender; the others go on
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    return Question(kernel, size, ready, moved, failed)


def attention(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Made:
    """Torch's own, plain and told scales by a mask or in channels; ours, plain, told, and scored; and torch's own with
    scores from its log-sum-exp. Where torch runs another kernel than it was asked for, a name says so."""
    images, heads, tokens, head = size
    q, k, v = torch.randn(images, tokens, 3, heads, head, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    scales = torch.ones(images, tokens - 1, device=device)
    mask = gtp_fx.key_bias(scales, 1, 0, None, q)
    runs: dict[str, Callable[[], object]] = {}
    wide = gtp_fx.scale_channels(q, k, scales, 1, 0, head**-0.5)

    def in_channels() -> Tensor:
        asking, told = gtp_fx.scale_channels(q, k, scales, 1, 0, head**-0.5)
        return stock_attention("cudnn", asking, told, v, scale=head**-0.5)

    for kind in ("cudnn", "flash"):
        runs[_really(kind, kind, q, k, v)] = partial(stock_attention, kind, q, k, v)
    runs[_really("cudnn", "cudnn, mask", q, k, v, mask)] = lambda: stock_attention("cudnn", q, k, v, mask)
    runs[_really("cudnn", "cudnn, channels", *wide, v)] = in_channels
    for name, told, score in (
        ("attend", None, "none"),
        ("attend, told", scales, "none"),
        ("attend, told, scored", scales, "mixed-max"),
        ("attend, scored", None, "mixed-max"),
    ):
        runs[name] = partial(attend, q, k, v, told, score, [])
    for kind, run in log_sum_exps(q, k, v).items():
        runs[f"{kind} and attention_scores"] = _scored(q, k, run)
    return runs, {}


def _really(kind: str, name: str, *operands: Tensor) -> str:
    """Return `name`, with the kernel that actually runs where that isn't `kind`."""
    taken = kernel_taken(kind, *operands)
    return name if taken == kind else f"{name} (runs {taken})"


def attend(q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None, score: str, tile: list[int]) -> Any:
    """Run GTP's attention kernel, with one prefix token."""
    return gtp_fx_kernels.attend(q, k, v, None, scales, None, score, 1, 0, tile)


def _scored(q: Tensor, k: Tensor, run: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], object]:
    def both() -> object:
        out, lse = run()
        return out, gtp_fx_kernels.attention_scores(q, k, lse, None, "mixed-max", 1, 0, None)

    return both


def _copy(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Made:
    source = torch.empty(size[0] // dtype.itemsize, dtype=dtype, device=device)
    into = torch.empty_like(source)
    return {"copy": lambda: into.copy_(source)}, {"copy": 2 * source.nbytes}


def _graph(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Made:
    """Return the token graph as an operator that Inductor compiles, and as a kernel."""
    images, patches, channels, _ = size
    side = round(patches**0.5)
    grid = [side, side] if side * side == patches else [1, patches]
    x = torch.randn(images, 1 + patches, channels, device=device).to(dtype)

    def composite(x: Tensor) -> Any:
        return gtp_fx.token_graph(x, grid, 1, "mixed", _NEIGHBORS)

    compiled: Any = torch.compile(composite, dynamic=False)
    return {
        "product and topk": partial(compiled, x),
        "token_graph": partial(gtp_fx_kernels.token_graph, x, grid, 1, "mixed", _NEIGHBORS),
    }, {}


def _propagate(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Made:
    """Return propagation at a site, and the add and norm in its place where there is no site.

    Each reads the stream and the branch, and writes the sum and its norm.
    """
    images, patches, channels, removed = size
    x = torch.randn(images, patches, channels, device=device).to(dtype)
    function, *arguments = propagation(x, removed)
    plain, *operands = stream_pass(x)
    fused: Any = torch.compile(plain, dynamic=False)
    moved = dtype.itemsize * channels * images * (4 * patches - 2 * removed)
    passed = dtype.itemsize * channels * images * 4 * patches
    runs = {"propagate": lambda: function(*arguments), "add and norm": lambda: fused(*operands)}
    return {**runs}, {"propagate": moved, "add and norm": passed}


def _select(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Made:
    images, patches, _, removed = size
    scores = torch.rand(images, patches, device=device)
    ranked = scores.numel() * (4 + 4 + 2 * 8)  # read; the map, and both pairs of lists
    return {"select": lambda: gtp_fx_kernels.select(scores, None, removed, patches)}, {"select": ranked}


def _embedding(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Made:
    """Return patch embedding as a convolution, and as a view and a product."""
    images, side, patch, channels = size
    x = torch.randn(images, 3, side, side, device=device).to(dtype)
    weight = torch.randn(channels, 3, patch, patch, device=device).to(dtype)

    def product() -> Tensor:
        cut = x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)
        return F.linear(cut.reshape(images, -1, 3 * patch * patch), weight.flatten(1))

    convolution = lambda: F.conv2d(x, weight, stride=patch).flatten(2).transpose(1, 2)  # noqa: E731
    return {"convolution": convolution, "linear": product}, {}


def repeats(device: torch.device) -> int:
    """Return the runs per timing. On a GPU, a single run can be as short as its launch."""
    return 20 if device.type == "cuda" else 1


def _repeated(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return the repeated run. On a GPU it is a CUDA graph, so that Python's time between launches isn't included."""
    if device.type != "cuda":
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats(device)):
            run()
    replay: Callable[[], object] = graph.replay
    return replay
