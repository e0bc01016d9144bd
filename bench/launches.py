"""Launches of generated code, read off Inductor's scheduler: what each moves between memory and the processor.

A buffer that a kernel reads in several places counts once, as far as it is read; what a kernel makes and uses itself
isn't moved. Caches between kernels aren't modelled: every kernel reads its operands from memory and writes its results
there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu_work import Shape, Work, extern_work, own_work

MARK = "gpu_traffic"
"""Key in a node's meta["custom"], which tracing hands on to all that the node becomes: the group it is counted in."""

GENERATED, OWN, LIBRARY = "generated", "own", "library"


@dataclass(frozen=True)
class Launch:
    """kernel: its name, of which the code has a number more. kind: Inductor's ("generated"), gtp_fx's ("own") or a
    library's. mark: of the operator that it comes from, "" where that has none. read, written: bytes."""

    kernel: str
    kind: str
    mark: str
    read: int
    written: int
    work: Work

    @property
    def bytes(self) -> int:
        return self.read + self.written


def launches_of(lowering: Any, names: Sequence[str]) -> tuple[Launch, ...]:
    """Of a GraphLowering whose code is generated, and is the current graph. names: what the code calls, in order.

    Raises NotImplementedError where the scheduler's nodes aren't one call each, of the same names.
    """
    nodes = [node for node in lowering.scheduler.nodes if _is_launched(node)]
    if len(nodes) != len(names):
        raise NotImplementedError(f"{len(nodes)} scheduled kernels, and {len(names)} calls in the code")
    return tuple(_launch(lowering, node, name) for node, name in zip(nodes, names, strict=True))


def _is_launched(node: Any) -> bool:
    from torch._inductor import ir
    from torch._inductor.scheduler import NopKernelSchedulerNode

    return not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, ir.MultiOutput)


def _launch(lowering: Any, node: Any, name: str) -> Launch:
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    if not isinstance(node, ExternKernelSchedulerNode):
        if not name.startswith("triton_"):
            raise NotImplementedError(f"{node.get_name()} is to be a generated kernel, and the code calls {name}")
        read, written = _moved_by_generated(lowering, node)
        return Launch(_unnumbered(name), GENERATED, _mark_of_generated(lowering, node), read, written, Work())
    if isinstance(node.node, ir.UserDefinedTritonKernel):
        return _own(node.node, name)
    return _library(node.node, name)


def _unnumbered(name: str) -> str:
    stem, _, number = name.rpartition("_")
    return stem if number.isdigit() else name


def _moved_by_generated(lowering: Any, node: Any) -> tuple[int, int]:
    """Bytes read and written, by the kernel's own index expressions."""
    from torch._inductor.dependencies import MemoryDep, StarDep

    own = {buffer.get_name() for buffer in node.get_outputs()}
    real = lowering.scheduler.mutation_real_name  # what a kernel has written to has a name more
    moved = []
    for dependencies, skipped in ((node.read_writes.reads, own), (node.read_writes.writes, lowering.removed_buffers)):
        places: dict[str, dict[Any, int]] = {}
        for dependency in dependencies:
            if dependency.name in skipped or not isinstance(dependency, MemoryDep | StarDep):
                continue
            name = real.get(dependency.name, dependency.name)
            found = places.setdefault(name, {})
            if isinstance(dependency, StarDep):
                found[None] = int(lowering.get_numel(name))
            else:  # two bodies that read the same entries merge their loops to the same expression
                plain = dependency.normalize()
                found[plain.index, plain.size] = _entries(plain)
        moved.append(
            sum(
                min(sum(found.values()), int(lowering.get_numel(name))) * lowering.get_dtype(name).itemsize
                for name, found in places.items()
            )
        )
    return moved[0], moved[1]


def _entries(dependency: Any) -> int:
    """How many entries it reads at most: one for each turn of the loops that its index depends on. A gather's index is
    itself read from memory, and may depend on all."""
    counted = dependency.index.free_symbols
    gathered = dependency.is_indirect()
    loops = zip(dependency.var_names, dependency.size, strict=True)
    return math.prod(int(size) for name, size in loops if gathered or name in counted)


def _mark_of_generated(lowering: Any, node: Any) -> str:
    """Of a fused kernel: the mark under which it makes most bytes, since what is fused to that rides along. Parts that
    are one operator's result decide; the origins of others are those of all that a kernel of ours reads."""
    votes: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for part in node.get_nodes():
        for made in {write.name for write in part.read_writes.writes}:
            size = int(lowering.get_numel(made)) * lowering.get_dtype(made).itemsize
            votes[part.node.get_origin_node() is not None][_mark_of(_origins(part.node, own=False))] += size
    return (votes[True] or votes[False]).most_common(1)[0][0]


def _origins(node: Any, own: bool = True) -> list[Any]:
    """The operators that an IR node is made of, its result's first. What is only written to memory because a kernel of
    ours reads it begins with that kernel, which isn't where it comes from: own, whether to count it."""
    origin = node.get_origin_node()
    found = list(node.get_origins()) if origin is None else [origin]
    return [other for other in found if own or "triton_kernel_wrapper" not in str(other.target)]


def _mark_of(origins: Sequence[Any]) -> str:
    """The first that there is."""
    marks = [(origin.meta.get("custom") or {}).get(MARK) for origin in origins]
    return next((str(mark) for mark in marks if mark is not None), "")


def _operands(node: Any) -> Iterator[Any]:
    for value in node.inputs:
        yield from value if isinstance(value, list | tuple) else [value]


def _shape(value: Any) -> Shape:
    return tuple(int(size) for size in value.get_size())


def _size(value: Any) -> int:
    """Bytes of what an operand's view shows. What a stride of 0 repeats is in memory once."""
    pairs = zip(value.get_size(), value.get_layout().stride, strict=True)
    return math.prod(int(size) for size, stride in pairs if stride != 0) * int(value.get_dtype().itemsize)


def _library(node: Any, name: str) -> Launch:
    from torch._inductor.ir import MultiOutputLayout

    if node.get_kernel_name() != name:
        raise NotImplementedError(f"{node.get_name()} calls {node.get_kernel_name()}, and the code {name}")
    operands = list(_operands(node))
    several = isinstance(node.layout, MultiOutputLayout)
    results = [result for result in node.outputs if hasattr(result, "get_size")] if several else [node]
    described = [(_shape(x), str(x.get_dtype()).removeprefix("torch.")) for x in operands]
    return Launch(
        kernel=name,
        kind=LIBRARY,
        mark=_mark_of(_origins(node)),
        read=sum(map(_size, operands)),
        written=sum(map(_size, results)),
        work=extern_work(name, described, _shape(results[0])),
    )


def _own(node: Any, name: str) -> Launch:
    """One of gtp_fx's kernels: each of its tensors once, as far as it is a view of its buffer."""
    from torch._inductor.ir import IRNode

    function = node.get_kernel_and_metadata()[0].fn
    kernel = function.__name__
    if _unnumbered(name) != kernel:
        raise NotImplementedError(f"{node.get_name()} launches {kernel}, and the code {name}")
    tensors = {key: value for key, value in node.kwargs.items() if isinstance(value, IRNode)}
    given = {key: _number(value) for key, value in node.kwargs.items() if key not in tensors}
    shapes = {key: _shape(value) for key, value in tensors.items()}
    made = {argument.get_name() for argument in node.mutable_args}
    results = [key for key, value in tensors.items() if value.get_name() in made]
    read, written = {}, {}  # by view: what stands in for an operand that is absent is another operand or a result
    for key, value in tensors.items():
        size = _size(value) - _left_unread(kernel, key, value, shapes)
        (written if key in results else read)[value.codegen_reference()] = size
    work = own_work(function.__module__.rpartition(".")[2], kernel, shapes, results, given)
    return Launch(kernel, OWN, _mark_of(_origins(node)), sum(read.values()), sum(written.values()), work)


def _left_unread(kernel: str, key: str, value: Any, shapes: dict[str, Shape]) -> int:
    """Bytes of an operand that a kernel passes by.

    `propagate` reads the neighbours of those that stay alone, [B, K, M] of [B, G, M]. Of the stream it reads all: each
    row that stays, and nearly each that leaves, since that has some neighbour that receives it (again from the cache,
    not from memory, where it has several).
    """
    if kernel == "propagate_kernel" and key == "near_ptr" and value.get_numel():
        (_, cells, _), (_, kept) = shapes[key], shapes["kept_ptr"]
        return _size(value) * (cells - kept) // cells
    return 0


def _number(value: Any) -> Any:
    return int(value) if getattr(value, "is_Integer", False) else value
