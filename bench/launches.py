"""Launches of generated code, from Inductor's scheduler, with the bytes that each moves to and from memory.

A buffer that a kernel reads in several places counts once, as far as it is read. Values that a kernel both makes and
uses aren't moved. Caches between kernels aren't modelled: every kernel reads its operands from memory and writes its
results there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu_work import Shape, Work, extern_work, own_work

MARK = "gpu_traffic"
"""Key in a node's meta["custom"] of the group that it counts in. Tracing copies it to all nodes that replace it."""

GENERATED, OWN, LIBRARY = "generated", "own", "library"


@dataclass(frozen=True)
class Launch:
    """One launch.

    kernel: name of the kernel, without the number that generated code appends.
    kind: Inductor's (`GENERATED`), gtp_fx's (`OWN`) or a library's (`LIBRARY`).
    mark: mark of the operator that it comes from, or "".
    read: bytes read.
    written: bytes written.
    work: what it computes.
    """

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
    """Return the launches of a GraphLowering, which is the current graph and has generated its code.

    names: functions that the code calls, in order.

    Raises NotImplementedError unless there is one call per node of the scheduler, with the same name.
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
    """Return the bytes read and written, from the kernel's index expressions."""
    from torch._inductor.dependencies import MemoryDep, StarDep

    own = {buffer.get_name() for buffer in node.get_outputs()}
    real = lowering.scheduler.mutation_real_name  # a mutated buffer has an additional name
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
    """Return the most entries that a dependency reads: one per iteration of the loops that its index depends on.

    A gather's index is itself read from memory, so it may depend on all loops.
    """
    counted = dependency.index.free_symbols
    gathered = dependency.is_indirect()
    loops = zip(dependency.var_names, dependency.size, strict=True)
    return math.prod(int(size) for name, size in loops if gathered or name in counted)


def _mark_of_generated(lowering: Any, node: Any) -> str:
    """Return the mark under which a fused kernel writes most bytes.

    Only parts that are one operator's result count, if there are any. The origins of other parts include everything
    that one of gtp_fx's kernels reads.
    """
    votes: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for part in node.get_nodes():
        for made in {write.name for write in part.read_writes.writes}:
            size = int(lowering.get_numel(made)) * lowering.get_dtype(made).itemsize
            votes[part.node.get_origin_node() is not None][_mark_of(_origins(part.node, own=False))] += size
    return (votes[True] or votes[False]).most_common(1)[0][0]


def _origins(node: Any, own: bool = True) -> list[Any]:
    """Return the operators that an IR node comes from, that of its result first.

    own: whether to include gtp_fx's kernels. A buffer that is only written because such a kernel reads it has the
        kernel among its origins, although it doesn't come from it.
    """
    origin = node.get_origin_node()
    found = list(node.get_origins()) if origin is None else [origin]
    return [other for other in found if own or "triton_kernel_wrapper" not in str(other.target)]


def _mark_of(origins: Sequence[Any]) -> str:
    """Return the first mark of the operators, or ""."""
    marks = [(origin.meta.get("custom") or {}).get(MARK) for origin in origins]
    return next((str(mark) for mark in marks if mark is not None), "")


def _operands(node: Any) -> Iterator[Any]:
    for value in node.inputs:
        yield from value if isinstance(value, list | tuple) else [value]


def _shape(value: Any) -> Shape:
    return tuple(int(size) for size in value.get_size())


def _size(value: Any) -> int:
    """Return the bytes in memory of an operand's view. A dimension of stride 0 counts once."""
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
    """Return the launch of one of gtp_fx's kernels. Each of its tensors counts once, with the size of its view."""
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
    read, written = {}, {}  # by view, since another operand or a result is passed in place of an absent operand
    for key, value in tensors.items():
        size = _size(value) - _left_unread(kernel, key, value, shapes)
        (written if key in results else read)[value.codegen_reference()] = size
    work = own_work(function.__module__.rpartition(".")[2], kernel, shapes, results, given)
    return Launch(kernel, OWN, _mark_of(_origins(node)), sum(read.values()), sum(written.values()), work)


def _left_unread(kernel: str, key: str, value: Any, shapes: dict[str, Shape]) -> int:
    """Return the bytes of an operand that a kernel doesn't read.

    `propagate` reads the neighbours of kept tokens only, [B, K, M] of [B, G, M]. It reads nearly all of the stream:
    each kept token's row, and that of each removed token with a kept neighbour (from the cache, where it has several).
    """
    if kernel == "propagate_kernel" and key == "near_ptr" and value.get_numel():
        (_, cells, _), (_, kept) = shapes[key], shapes["kept_ptr"]
        return _size(value) * (cells - kept) // cells
    return 0


def _number(value: Any) -> Any:
    return int(value) if getattr(value, "is_Integer", False) else value
