"""Measurement of a target's rates and curves on this machine, for `gtp-fx tune`: a minute or two of small kernels.

Each probe is a kernel with a known amount of work. Its time is the median over interleaved rounds. The best rates
become the roofs, and a kind of work's curve gives its share of the roof by amount. Work that the compiler fuses is
measured compiled, since that is how it will run.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtp_fx.kernels.available import has_kernels
from gtp_fx.measure.site_probes import propagation, scored_attention, selection, similar_tokens, stream_pass
from gtp_fx.measure.steadiness import Steadiness, processor_share
from gtp_fx.measure.timing import clock_for, interleave
from gtp_fx.options.progress import Progress
from gtp_fx.report.text import table
from gtp_fx.strategies import GTP
from gtp_fx.strategies.protocol import SiteShape
from gtp_fx.targets.target import MOST_SHARE, Curve, Target
from gtp_fx.targets.work import DENSE, KINDS, Work

ROUNDS = 9
_WIDTH, _HEAD = 384, 64
"""Channels and head size of the probes: a small ViT's."""
_LEAST_SHARE = 1e-4
_LONG_ENOUGH, _MOST_REPEATS = 4e-3, 50
"""Least seconds of a timing, and most repeats of a kernel to reach them. A model runs kernels back to back too."""
CALL, SHORT_CHAIN, LONG_CHAIN, _CHAIN = "a call", "one small product", "a chain of small products", 21
"""Names of the probes for the fixed cost of a compiled call and of each kernel in it; and the long chain's products."""


@dataclass(frozen=True)
class Probe:
    """A kernel to time.

    name: unique name.
    kind: kind of work, a name in KINDS; "" for a probe of fixed costs.
    amount: amount of work, by which the kind's curve is indexed.
    work: FLOPs or bytes of the kernel.
    run: runs the kernel once.
    less: names of the probes whose time is subtracted, since it isn't part of this kind's work.
    """

    name: str
    kind: str
    amount: float
    work: Work
    run: Callable[[], object]
    less: tuple[str, ...] = ()


def tune_target(
    target: Target,
    dtype: torch.dtype = torch.float32,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    anyway: bool = False,
) -> Target:
    """Return `target` with rates and curves measured on this machine's `target.device`.

    dtype: dtype of products and attention.
    rounds: rounds of timing; each runs every probe once.
    progress: called at every step.
    anyway: return what was measured on a busy machine, too.

    Raises BusyError where the machine is too busy.
    """
    device = torch.device(target.device)
    clock = clock_for(device)
    with torch.no_grad():
        probes = list(_probes(device, dtype))
        if device.type == "cpu" and not anyway:  # don't let anybody wait for a refusal
            _must_be_idle(next(probe for probe in probes if probe.kind == "product"))
        total = len(probes) * (rounds + 2)
        done = 0

        def step(label: str) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(label, done, total)

        # Run each probe twice before timing it (the first run compiles), and find the repeats that a timing needs.
        repeats = {}
        for probe in probes:
            probe.run()
            probe.run()
            taken = clock(probe.run)
            repeats[probe.name] = max(1, min(_MOST_REPEATS, round(_LONG_ENOUGH / max(taken, 1e-9))))
            step(f"compiling ({probe.kind or 'launches'})")
        runs = {probe.name: _repeated(probe.run, repeats[probe.name]) for probe in probes}
        with processor_share() as share:
            timings = interleave(runs, rounds=rounds, warmup=1, clock=clock, progress=lambda: step("timing"))
    steady = Steadiness.of(timings, share.value if device.type == "cpu" else None)
    if not anyway:
        steady.must_be_steady()
    seconds = {name: statistics.median(values) / repeats[name] for name, values in timings.seconds.items()}
    made = fitted(target, probes, seconds, str(dtype).removeprefix("torch."), rounds)
    return replace(made, measured=f"{made.measured}, {steady}")


def _must_be_idle(probe: Probe) -> None:
    """Raise BusyError where this thread hasn't a processor of its own for half a second of a probe."""
    with processor_share() as share:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            probe.run()
    Steadiness(None, share.value).must_be_steady()


def fitted(target: Target, probes: Sequence[Probe], seconds: dict[str, float], dtype: str, rounds: int) -> Target:
    """Return the target whose curves go through the probes' times.

    seconds: time of each probe, by name. It includes the two chains of small products.
    dtype: dtype of the products, as the target names it.
    rounds: rounds of timing, for the record.
    """
    # A kernel's launch cost: the two chains differ in nothing but the number of their kernels.
    launch = max((seconds[LONG_CHAIN] - seconds[SHORT_CHAIN]) / (_CHAIN - 1), 0.0)
    # Subtract from each probe what isn't its own work, but never so much that noise could make the rest 0 or negative.
    own = {}
    for probe in probes:
        taken = seconds[probe.name]
        beside = sum(seconds[name] for name in probe.less) if probe.less else launch
        own[probe.name] = max(taken - beside, 0.02 * taken)
    # The roofs: the fastest product gives FLOP/s, the largest stream bytes per second.
    dense = max(p.work.flops / own[p.name] for p in probes if p.kind == "product")
    longest = max((p for p in probes if p.kind == "stream"), key=lambda p: p.amount)
    bandwidth = longest.work.bytes / own[longest.name]
    # Each kind's curve: amount -> time at the roof / measured time, the mean where probes have the same amount.
    curves = {}
    for kind in dict.fromkeys(p.kind for p in probes if p.kind):
        points: dict[float, list[float]] = {}
        for probe in (p for p in probes if p.kind == kind):
            roof = probe.work.flops / dense if kind in DENSE else probe.work.bytes / bandwidth
            points.setdefault(probe.amount, []).append(roof / own[probe.name])
        shares = {amount: min(max(statistics.fmean(s), _LEAST_SHARE), MOST_SHARE) for amount, s in points.items()}
        curves[kind] = Curve(tuple(sorted(shares.items())))
    others = {name: rate for name, rate in target.dense.items() if name != dtype}
    # Rates of the other dtypes keep their listed proportion to the measured one.
    scaled = {name: rate * dense / target.rate(dtype) for name, rate in others.items()}
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return replace(
        target,
        dense={**scaled, dtype: dense},
        bandwidth=bandwidth,
        launch=launch,
        curves={**target.curves, **curves},
        measured=f"{when}, {dtype}, medians of {rounds} rounds",
        tiles=(),
        attention_tile=(1, 1),
    )


def _probes(device: torch.device, dtype: torch.dtype) -> Iterator[Probe]:
    """Yield the probes of every kind of work that `device` does, with inputs in `dtype` on it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    big = 4 if device.type == "cpu" else 64  # images; it takes many to keep a GPU busy
    size = dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    kernels = has_kernels(device)
    # Fixed costs: a call, and the launches in it.
    tiny = random(8, 8)
    yield Probe(CALL, "", 0, Work("stream"), _compiled(lambda x: x + 1, tiny[0]))
    yield Probe(SHORT_CHAIN, "", 0, Work("stream"), _compiled(lambda x: _chain(x, 1), tiny))
    yield Probe(LONG_CHAIN, "", 0, Work("stream"), _compiled(lambda x: _chain(x, _CHAIN), tiny))
    # Products, in the shapes of a ViT's projections and MLP.
    for rows in (64, 256, 1024, 4096):
        for inner, columns in ((_WIDTH, 4 * _WIDTH), (4 * _WIDTH, _WIDTH), (2 * _WIDTH, 2 * _WIDTH)):
            rows_here = rows * (big // 4)
            x, weight, bias = random(rows_here, inner), random(columns, inner), random(columns)
            flops = 2 * rows_here * inner * columns
            work = Work("product", flops, dtype=name)
            yield Probe(f"product {rows}x{inner}x{columns}", "product", flops, work, _bound(F.linear, x, weight, bias))
    # Convolutions: two of a stem, and a patch embedding.
    for side, channels, out, kernel in ((56, 64, 64, 3), (28, 128, 256, 3), (224, 3, _WIDTH, 16)):
        x, weight = random(big, channels, side, side), random(out, channels, kernel, kernel)
        stride = kernel if kernel > 3 else 1
        y = F.conv2d(x, weight, stride=stride, padding=0)
        flops = 2 * y.numel() * channels * kernel * kernel
        yield Probe(
            f"convolution {side} {channels} {out}",
            "convolution",
            flops,
            Work("convolution", flops, dtype=name),
            _bound(F.conv2d, x, weight, None, stride),
        )
    # Attention alone, and in some sizes with scores, whose cost is what the scores add to it.
    for tokens in (49, 98, 197, 394, 785):
        q = random(big, 6, tokens, _HEAD)
        flops = 4 * q.numel() * tokens
        work = Work("attention", flops, dtype=name)
        plain = f"attention {tokens}"
        yield Probe(plain, "attention", tokens, work, _bound(F.scaled_dot_product_attention, q, q, q))
        if tokens in (49, 197, 394):
            shape = SiteShape(tokens, tokens, 0, 6 * _HEAD, 6, big, name, _HEAD, kernels=kernels)
            work = _of_kind("scores", GTP().site_works(shape, scales_read=False))
            scored = _compiled(*scored_attention(q))
            yield Probe(f"scores {tokens}", "scores", work.bytes, work, scored, less=(plain, CALL))
    # The residual stream: an add and a layer norm.
    for rows in (200, 800, 6400):
        x = random(rows * (big // 4), _WIDTH)
        moved = 3 * x.numel() * size
        yield Probe(
            f"stream {rows}",
            "stream",
            moved,
            Work("stream", bytes=moved),
            _compiled(_norm_of_sum, x, x.clone()),
            (CALL,),
        )
    # A site: propagation and the selection of the tokens.
    for tokens in (98, 392):
        x = random(big, tokens, _WIDTH)
        removed = tokens // 12
        # The cost model prices a site's add and norm as any block's, so they are timed without a site and subtracted.
        plain, passed = f"stream of {tokens}", 4 * x.numel() * size
        whole = _compiled(*stream_pass(x))
        yield Probe(plain, "stream", passed, Work("stream", bytes=passed), whole, (CALL,))
        shape = SiteShape(tokens, tokens - removed, 0, _WIDTH, 6, big, name, _HEAD, kernels=kernels)
        work = _of_kind("gather", GTP().site_works(shape, scales_read=True))
        propagated = _compiled(*propagation(x, removed))
        yield Probe(f"gather {tokens}", "gather", work.bytes, work, propagated, (plain,))
        scores = random(big, tokens).float()
        ranked = 4 * scores.numel()
        yield Probe(
            f"sort {tokens}",
            "sort",
            ranked,
            Work("sort", bytes=ranked),
            _compiled(*selection(scores, removed)),
            (CALL,),
        )
    # The token graph: one kernel where there are kernels, else a ranking of all pairs.
    for side in (14, 24) if kernels else ():
        x = random(big, side * side, _WIDTH)
        work = _of_kind("neighbors", GTP().start_works((side, side), _WIDTH, big, name, kernels=True))
        graph = _compiled(*similar_tokens(x, [side, side]))
        yield Probe(f"neighbors {side}", "neighbors", work.bytes, work, graph, (CALL,))
    for side in () if kernels else (49, 196):
        pairs = random(big, side, side).float()
        ranked = 4 * pairs.numel()
        work = Work("sort", bytes=ranked)
        yield Probe(f"sort pairs {side}", "sort", ranked, work, _compiled(_nearest, pairs), (CALL,))


def _of_kind(kind: str, works: Sequence[Work]) -> Work:
    """Return the entry of a site's works with this kind, so that curves are fitted to the amounts they are read at."""
    return next(work for work in works if work.kind == kind)


def _nearest(similarity_BGG: Tensor) -> Tensor:
    """Return each token's 8 most similar tokens, ranked as the token graph ranks all pairs, once per stream."""
    return similarity_BGG.topk(8, dim=-1, sorted=False).indices


def _chain(x: Tensor, length: int) -> Tensor:
    """Return the result of `length` dependent products."""
    y = x
    for _ in range(length):
        y = y @ x
    return y


def _repeated(run: Callable[[], object], times: int) -> Callable[[], object]:
    def again() -> None:
        for _ in range(times):
            run()

    return again


def _norm_of_sum(x: Tensor, y: Tensor) -> Any:
    total = x + y
    return F.layer_norm(total, total.shape[-1:]) * total


def _bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
    compiled: Any = torch.compile(function, dynamic=False)
    return lambda: compiled(*arguments)


def describe(target: Target) -> str:
    """Return a table of a measured target's rates and curves."""
    rates = ", ".join(f"{rate / 1e9:.4g} GFLOP/s in {dtype}" for dtype, rate in target.dense.items())
    rows = [
        [kind, re.split("[;,]", KINDS[kind])[0], *(f"{share:.2g}" for _, share in (curve.points[0], curve.points[-1]))]
        for kind, curve in target.curves.items()
    ]
    return "\n".join(
        [
            f"{target.name}: {rates}; {target.bandwidth / 1e9:.4g} GB/s; {target.launch * 1e6:.3g} us a kernel",
            f"({target.measured})",
            "",
            table(["kind of work", "", "share of the roof:\nleast amount", "largest"], rows, left=(0, 1)),
        ]
    )
