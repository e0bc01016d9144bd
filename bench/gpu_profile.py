"""Profile of a model's time by operator: its kernels from torch.profiler, grouped by what they do.

Kernels are grouped by name: those of cuBLAS, cuDNN, flash attention and GTP, and those that Inductor generates, whose
names list the fused operators.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from gtp_fx.measure.timing import Run

_GENERATED = re.compile(r"^triton_(poi|per|red|for)_")
_IN_GENERATED = (
    ("graph", r"topk|masked_fill|eye|linalg_vector_norm|remainder"),
    ("score", r"amax|_max_"),
    ("pointwise", r""),
)
"""Groups of generated kernels, by fused operators that occur in the token graph or in scores, but not elsewhere."""
_NAMED = (
    ("graph", r"token_graph|topk|radix|bitonicsort|sgemm|simt|gemm_f32f32"),
    ("score", r"scores_kernel"),
    ("select", r"select_kernel"),
    ("propagate", r"propagate_kernel"),
    ("recover", r"recover_kernel"),
    ("attention", r"attend_kernel|sdpa|flash|fmha|scaled_dot_product"),
    ("conv", r"conv|fprop|nchwtonhwc|nhwctonchw"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|splitk|gemv|triton_tem|aten::(add|b|baddb)?mm$"),
    ("pointwise", r"elementwise|layer_?norm|reduce_kernel|gelu"),
)
"""Groups of other kernels; the first match counts. Float32 products without tensor cores are the token graph's, since
all others are in the model's dtype."""
GROUPS = ("gemm", "attention", "pointwise", "conv", "graph", "score", "select", "propagate", "recover", "other")
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_MOST_KERNELS = 60


@dataclass(frozen=True)
class Profile:
    """Time of one call, in microseconds.

    total: time of all kernels.
    groups: time by group, in the order of `GROUPS`.
    kernels: (name, group, launches, microseconds), the longest first.
    products: (launches, microseconds) of matrix products, by their operands' sizes.
    """

    total: float
    groups: Mapping[str, float]
    kernels: tuple[tuple[str, str, float, float], ...]
    products: Mapping[str, tuple[float, float]]


def group_of(kernel: str) -> str:
    """Return a kernel's group, one of `GROUPS`."""
    name = kernel.lower()
    rules = _IN_GENERATED if _GENERATED.match(name) else _NAMED
    return next((group for group, words in rules if re.search(words, name)), "other")


def profiled(run: Run, calls: int, device: torch.device, trace: Path) -> Profile:
    """Profile `calls` calls of `run`. On a CPU, operators replace kernels.

    trace: file for the timeline, gzipped.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    trace.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(calls):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    return summed(events, calls, _ON_GPU if on_gpu else ("cpu_op",))


def summed(events: Iterable[Mapping[str, Any]], calls: int, categories: tuple[str, ...]) -> Profile:
    """Return the profile of a timeline in Chrome's format.

    calls: number of calls in the timeline.
    categories: categories of the events that count as kernels.
    """
    events = list(events)
    operators = {_id(event): event for event in events if event.get("cat") == "cpu_op"}
    count: dict[str, int] = defaultdict(int)
    taken: dict[str, float] = defaultdict(float)
    products: dict[str, tuple[float, float]] = {}
    for event in events:
        if event.get("cat") not in categories or "dur" not in event:
            continue
        name, spent = str(event["name"]), float(event["dur"]) / calls
        count[name] += 1
        taken[name] += spent
        sizes = _sizes(operators.get(_id(event)))
        if sizes and group_of(name) in ("gemm", "graph"):
            launches, before = products.get(sizes, (0.0, 0.0))
            products[sizes] = launches + 1 / calls, before + spent
    groups = dict.fromkeys(GROUPS, 0.0)
    for name, spent in taken.items():
        groups[group_of(name)] += spent
    longest = sorted(taken, key=taken.__getitem__, reverse=True)[:_MOST_KERNELS]
    kernels = tuple((name[:200], group_of(name), count[name] / calls, taken[name]) for name in longest)
    return Profile(sum(taken.values()), groups, kernels, products)


def _id(event: Mapping[str, Any]) -> Any:
    """Return the id that a kernel's event shares with the operator that launched it."""
    return event.get("args", {}).get("External id")


def _sizes(operator: Mapping[str, Any] | None) -> str:
    """Return the sizes of a product's two matrices, such as "256x768 768x2304"; "" for another operator."""
    if operator is None:
        return ""
    named = re.fullmatch(r"aten::(add|b|baddb)?mm", str(operator["name"]))
    if named is None:
        return ""
    first = 1 if named[1] in ("add", "baddb") else 0  # the first operand is the one that is added
    matrices = operator["args"].get("Input Dims", [])[first : first + 2]
    return " ".join("x".join(map(str, size)) for size in matrices)
