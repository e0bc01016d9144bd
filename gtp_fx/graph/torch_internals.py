"""Every private name of torch that this package calls: a function each, with the public name that may replace it.

Modules that take a second or more to import are imported inside the functions that need them. The dictionaries that an
`nn.Module` keeps its parameters in (`_parameters`, `_buffers`, `_modules`) are used directly where modules share them
(`gtp_fx.model`).
"""

from __future__ import annotations

import contextlib
import copyreg
import importlib
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, fx, nn
from torch._logging._internal import trace_structured
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import attention
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# ---- graphs


def take_signature(graph: fx.Graph, of: fx.Graph) -> None:
    """Give `graph` the structure of another graph's inputs and outputs, which torch.export keeps in its code generator.

    Public: nothing; `fx.GraphModule.__copy__` copies the whole module.
    """
    graph._codegen = of._codegen


def return_flat(graph: fx.Graph, returned: list[fx.Node]) -> None:
    """Let a graph that has a structure of outputs return a flat list instead."""
    codegen: Any = graph._codegen
    if hasattr(codegen, "pytree_info"):
        out_spec = pytree.tree_structure(returned)
        graph.set_codegen(type(codegen)(codegen.pytree_info._replace(out_spec=out_spec)))


def copy_parameter_sources(gm: fx.GraphModule, of: fx.GraphModule) -> None:
    """Keep Dynamo's notes of where parameters come from, which Inductor's `freezing` needs."""
    if hasattr(of, "_param_name_to_source"):
        gm._param_name_to_source = of._param_name_to_source  # type: ignore[assignment]


def is_operator(target: object) -> TypeGuard[torch._ops.OpOverload]:
    """Return whether a node's target is one overload of an operator, such as aten.mm.default."""
    return isinstance(target, torch._ops.OpOverload)


def decomposes(target: Any) -> bool:
    """Return whether an operator is written in others, so that `decompose` runs these. Public: `decompose` itself."""
    return bool(target._can_decompose())


def is_higher_order(target: Any) -> bool:
    """Return whether an operator takes functions, as `torch.cond` and flex_attention do. Public: none."""
    return isinstance(target, HigherOrderOperator)


def indexing_by_tensors() -> AbstractContextManager[Any]:
    """Return a context in which `table[i]` takes a tensor of one number as an index, as in flex_attention's functions.

    Public: none.
    """
    module = importlib.import_module("torch._dynamo._trace_wrapped_higher_order_op")
    return cast("AbstractContextManager[Any]", module.TransformGetItemToIndex())


def is_functorch(target: Any) -> bool:
    """Return whether a call is one by which torch.func (`vmap`, `grad`) goes in and out of its levels. Public: none."""
    return str(getattr(target, "__module__", "")).startswith(("torch._functorch", "torch._C._functorch"))


# ---- fake tensors


def fake_mode() -> AbstractContextManager[Any]:
    """Return a mode in which tensors have shapes and no numbers.

    Public: none for a mode; only tracing with `torch.export.Dim` makes one.
    """
    return FakeTensorMode()


def is_fake(value: Any) -> bool:
    """Return whether a value is a tensor with a shape and no numbers. Public: none."""
    return isinstance(value, FakeTensor)


def mode_of(fake: Tensor) -> AbstractContextManager[Any]:
    """Return the mode that a fake tensor was made in; fakes of different modes don't mix."""
    return cast("AbstractContextManager[Any]", cast(FakeTensor, fake).fake_mode)


def floor_divided(size: Any) -> list[tuple[Any, int]]:
    """Return each symbol that a symbolic size divides by a number, up or down, and the number: (B, 2) for B // 2.

    Public: none.
    """
    from torch.utils._sympy.functions import FloorDiv  # with sympy; a capture has imported it

    quotients = [quotient.args for quotient in size.atoms(FloorDiv) if quotient.args[1].is_Integer]
    # A number is rounded up by adding the divisor less one before.
    wholes = [(part, int(by)) for whole, by in quotients for part in (whole, whole - by + 1)]
    return [(whole, by) for whole, by in wholes if whole.is_Symbol]


# ---- errors

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Errors of a machine that lacks memory, on the host and on a device."""


def restarts_dynamo(error: Exception) -> bool:
    """Return whether an error is how a backend asks Dynamo to trace the function again. Public: none."""
    if "torch._dynamo.exc" not in sys.modules:
        return False
    exceptions: Any = sys.modules["torch._dynamo.exc"]
    return isinstance(error, exceptions.RestartAnalysis)


# ---- tracing and compiling


def aot_export(gm: fx.GraphModule, fakes: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
    """Return Dynamo's graph in functional pre-dispatch ATen, and its signature; traced in a tracing context of its own.

    A graph enters and leaves torch.func's levels by calls of its own, so a trace that fails between them leaves some
    open, and Dynamo's guards ask for them. They are closed here.

    Public: `torch.export.export`, which takes modules and not a backend's graphs.
    """
    from torch._C import _functorch
    from torch._functorch.aot_autograd import aot_export_module
    from torch._guards import TracingContext, detect_fake_mode, tracing

    levels = _functorch.get_dynamic_layer_stack_depth()
    try:
        with tracing(TracingContext(detect_fake_mode(list(fakes)))), torch.no_grad():
            exported, signature = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True, decompositions={})
    finally:
        _functorch.pop_dynamic_layer_stack_and_undo_to_depth(levels)
    return cast("fx.GraphModule", exported), signature


def decomposition_tables() -> tuple[Mapping[Any, Callable[..., Any]], ...]:
    """Return torch's tables of decompositions: torch.export's, then all that torch knows, for what no backend opens.

    Public: the first is `torch.export.default_decompositions`; the second has no public name.
    """
    from torch._decomp import decomposition_table

    return torch.export.default_decompositions(), decomposition_table


def trace_functional(function: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule | None:
    """Trace a function of fake values as ATen below autograd, where composites are open; sizes stay symbols.

    Return None where the function asks something of a size that isn't known, such as whether a batch is 2: the trace
    would hold for one answer. Public: none.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    fakes = [leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, FakeTensor)]
    mode = mode_of(fakes[0]) if fakes else contextlib.nullcontext()  # constants that it makes are fakes of this one
    with torch.no_grad(), _quiet(), _asking_nothing(fakes) as asked, mode:
        try:
            traced = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
        except Exception:
            if asked():
                return None
            raise
    return None if asked() else traced


@contextlib.contextmanager
def _asking_nothing(fakes: Sequence[FakeTensor]) -> Iterator[Callable[[], bool]]:
    """Freeze the symbols of fake tensors; yield a function that tells whether anything was asked of them since."""
    environments: Any = [fake.fake_mode.shape_env for fake in fakes if fake.fake_mode.shape_env is not None]
    if not environments:
        yield lambda: False
        return
    environment = environments[0]
    before, frozen = environment.counter["ignored_backward_guard"], environment.frozen
    environment.frozen = True  # questions are counted; later torch also has an error for them
    raising = getattr(environment, "error_on_new_guards", contextlib.nullcontext)
    try:
        with raising():
            yield lambda: environment.counter["ignored_backward_guard"] > before
    finally:
        environment.frozen = frozen


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging what fails while something is tried."""
    loggers = [
        logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
    ]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def tracing_lock() -> AbstractContextManager[Any]:
    """Return the lock that Dynamo holds when it calls a backend, as a context. Public: none."""
    return cast("AbstractContextManager[Any]", importlib.import_module("torch._dynamo.convert_frame").compile_lock)


def compile_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile with Inductor a graph that a backend was given. Public: `torch.compile`, which traces anew."""
    compile_fx = importlib.import_module("torch._inductor.compile_fx").compile_fx
    return cast("Callable[..., Any]", compile_fx(gm, list(inputs), config_patches=dict(options)))


def fill_values(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Note every node's value, as fake tensors, where Dynamo hasn't, in the fake mode that its inputs were traced in.

    A backend's inputs may be real tensors, whose sizes tell nothing of symbols; Dynamo's fakes of them, with the
    symbols, are in the placeholders' metadata.

    Public: `torch.fx.passes.fake_tensor_prop`, undocumented.
    """
    from torch._guards import detect_fake_mode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    if all("example_value" in node.meta for node in gm.graph.nodes if node.op != "output"):
        return
    given = [
        node.meta.get("example_value", value)
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    ]
    modes = [value.fake_mode for value in given if isinstance(value, FakeTensor)]
    mode = modes[0] if modes else detect_fake_mode(list(inputs))
    if mode is None:
        return
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
        if node.op != "placeholder":
            node.meta.pop("example_value", None)
    fakes = [
        mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) and not is_fake(value) else value
        for value in given
    ]
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True  # for the graph's own constants
    try:
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    finally:
        mode.allow_non_fake_inputs = before


def open_sizes(tensor: Tensor, dims: Sequence[int]) -> None:
    """Mark sizes of a tensor of which code compiled for it is to take any from two up; compiling raises if it can't.

    Public: `torch._dynamo.mark_dynamic`, itself undocumented but in tutorials.
    """
    importlib.import_module("torch._dynamo").mark_dynamic(tensor, list(dims))


def has_hint(size: Any) -> bool:
    """Return whether a size is known in the first run: not one that depends on the data. Public: none."""
    return not isinstance(size, torch.SymInt) or bool(size.node.has_hint())


def written_to(value: Any) -> bool:
    """Return whether a tensor was written to in place since it was made. Public: none."""
    return isinstance(value, Tensor) and not value.is_inference() and value._version > 0


class OpenSizes:
    """Sizes that a compiled function takes as symbols, and what its compilation came to assume of them.

    Public: `torch._dynamo.mark_dynamic`, for sizes of one function's arguments that nothing relates.
    """

    def __init__(self) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        # Sizes that happen to be equal aren't the same: another section has others.
        self._shapes = ShapeEnv(duck_shape=False)
        self._mode = FakeTensorMode(shape_env=self._shapes)
        self._symbols: dict[Any, Any] = {}
        self._values: dict[Any, int] = {}
        self._fakes: list[Any] = []
        self._guards: str | None = None

    def integer(self, value: int, key: Any) -> Any:
        """Return a symbolic integer for an argument; one for all arguments, sizes and strides of the same key."""
        from torch._dynamo.source import LocalSource

        fake = self._symbol(value, key, LocalSource(self._argument))
        self._fakes.append(fake)
        return fake

    def fake(self, value: Any, keys: Sequence[Any]) -> Any:
        """Return a fake of an argument, whose sizes and strides are symbolic where they have a key."""
        if not isinstance(value, Tensor):
            return self.integer(value, keys[0])
        if all(key is None for key in keys):
            fake: Tensor = self._mode.from_tensor(value, static_shapes=True)
        else:
            sizes = [
                self._symbol(n, key, self._source("SIZE", dim))
                for dim, (n, key) in enumerate(zip(value.shape, keys[: value.dim()], strict=True))
            ]
            with self._mode:
                fake = torch.empty_strided(
                    sizes, self._strides(value, keys, sizes), dtype=value.dtype, device=value.device
                )
            fake.requires_grad_(value.requires_grad)
        self._fakes.append(fake)
        return fake

    def _strides(self, value: Tensor, keys: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
        """Return strides as products of sizes, as a contiguous tensor has them; else symbols of their own."""
        found: list[Any] = []
        for dim, (stride, key) in enumerate(zip(value.stride(), keys[value.dim() :], strict=True)):
            order = [(theirs, -d) for d, theirs in enumerate(value.stride())]
            inner = [d for d in range(value.dim()) if order[d] < order[dim]]
            product, number = 1, 1
            for d in inner:
                product, number = product * sizes[d], number * value.shape[d]
            if key is None:
                found.append(stride)
            elif number and stride % number == 0:
                found.append(product * (stride // number))
            else:
                found.append(self._symbol(stride, key, self._source("STRIDE", dim)))
        return found

    @property
    def _argument(self) -> str:
        """Return the next argument's name, as the guards are evaluated with."""
        return f"t{len(self._fakes)}"

    def _source(self, kind: str, dim: int) -> Any:
        from torch._dynamo.source import LocalSource, TensorProperty, TensorPropertySource

        return TensorPropertySource(LocalSource(self._argument), TensorProperty[kind], dim)

    def _symbol(self, value: int, key: Any, source: Any) -> Any:
        """Return a number, or the symbol of its key; `source` is where a guard finds a new one."""
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        # A real stride may differ from what the graph's fakes, and so its key, say: then it is a number.
        if key is None or self._values.setdefault(key, value) != value:
            return value
        if key not in self._symbols:
            # A number that is no size, such as a place counted from the end, may be negative.
            create = self._shapes.create_symbol if value > 1 else self._shapes.create_unspecified_symbol
            symbol = create(value, source, dynamic_dim=DimDynamic.DYNAMIC)
            self._symbols[key] = self._shapes.create_symintnode(symbol, hint=value, source=source)
        return self._symbols[key]

    def has(self, key: Any) -> bool:
        """Return whether there is a symbol of a key."""
        return key in self._symbols

    def tracing(self) -> AbstractContextManager[Any]:
        """Return the context in which to compile for these arguments."""
        from torch._guards import TracingContext, tracing

        return tracing(TracingContext(self._mode))

    def hold_for(self, values: Sequence[Any]) -> bool:
        """Return whether other arguments are within what was assumed while compiling."""
        from torch._dynamo.source import LocalSource

        if self._guards is None:
            sources = [LocalSource(f"t{i}") for i in range(len(self._fakes))]
            guards = self._shapes.produce_guards(self._fakes, sources, ignore_static=False)
            # Compiled code is given addresses, so it is the same wherever in its storage a tensor begins.
            self._guards = " and ".join(guard for guard in guards if "storage_offset()" not in guard) or "True"
        return bool(self._shapes.evaluate_guards_expression(self._guards, values))


def inductor_config() -> dict[str, Any]:
    """Return every option of Inductor with its value. Public: `torch._inductor.list_options`, names alone."""
    config: Any = importlib.import_module("torch._inductor.config")
    return dict(config.get_config_copy())


def folds_weights() -> bool:
    """Return whether Inductor makes constants of weights (`torch._inductor.config.freezing`). Public: none."""
    return bool(importlib.import_module("torch._inductor.config").freezing)


def inductor_modes() -> Mapping[str, Mapping[str, Any]]:
    """Return `torch.compile`'s modes, with each one's options. Documented, under a private module's name."""
    return cast("Mapping[str, Mapping[str, Any]]", torch._inductor.list_mode_options())


def package_aoti(program: torch.export.ExportedProgram, file: str) -> None:
    """Write a program as an AOTInductor package. Documented, under a private module's name."""
    importlib.import_module("torch._inductor").aoti_compile_and_package(program, package_path=file)


def load_aoti(file: str) -> Callable[..., Any]:
    """Load an AOTInductor package as a function. Documented, under a private module's name."""
    return cast("Callable[..., Any]", importlib.import_module("torch._inductor").aoti_load_package(file))


def compiler_cache() -> Path:
    """Return the folder in which Inductor keeps what it compiles. Public: the variable TORCHINDUCTOR_CACHE_DIR."""
    return Path(importlib.import_module("torch._inductor.runtime.cache_dir_utils").cache_dir())


@contextlib.contextmanager
def fresh_compiler_cache() -> Iterator[Path]:
    """Let torch find nothing compiled, and keep nothing afterwards; yield Inductor's folder, empty.

    `torch.compiler.save_cache_artifacts` then has what is compiled meanwhile. It is the process's: other threads that
    compile do so anew. Public: none.
    """
    manager = importlib.import_module("torch.compiler._cache").CacheArtifactManager
    with importlib.import_module("torch._inductor.utils").fresh_cache(), manager.with_fresh_cache():
        yield compiler_cache()


def name_memory_formats() -> None:
    """Let memory formats be pickled by their names, from now on in this process, as torch does with layouts.

    Torch's keys of compiled code hold a pickled memory format. Pickle writes it as an attribute of the first module it
    finds to have it, which is any that imported torch: the keys would be others in a process that imported its own
    modules in another order. What is pickled like this can be read without this package.
    """
    copyreg.pickle(torch.memory_format, _by_name)


def _by_name(memory_format: torch.memory_format) -> tuple[Callable[..., Any], tuple[str]]:
    """Return how a memory format is read back: `torch:channels_last` in the words of pkgutil."""
    return pkgutil.resolve_name, (str(memory_format).replace(".", ":"),)


def cache_misses() -> int:
    """Return how many graphs this process has compiled that no cache had, or could have. Public: none."""
    counters = importlib.import_module("torch._dynamo.utils").counters
    return sum(
        count
        for group in ("inductor", "aot_autograd")
        for name, count in counters[group].items()
        if name.endswith(("cache_miss", "cache_bypass"))
    )


def given_to_compile(module: nn.Module) -> nn.Module | None:
    """Return the module that torch.compile was given, where `module` is what it returned. Public: none."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return cast("nn.Module", module._orig_mod) if frames and isinstance(module, frames.OptimizedModule) else None


# ---- counting


def registered_formula(target: Any) -> Callable[..., int] | None:
    """Return torch's formula for the FLOPs of an operator; None where it has none. Takes a call's arguments, `out_val`.

    Public: `torch.utils.flop_counter.flop_registry`, by packets of overloads.
    """
    return cast("Callable[..., int] | None", flop_registry.get(getattr(target, "_overloadpacket", target)))


def run_counted(target: Any, args: Any, kwargs: Any) -> tuple[int, list[Any]]:
    """Run a call; return its FLOPs by torch's formulas, and the operators that it called last that have none.

    Public: `FlopCounterMode`, which doesn't tell the operators, and takes a hundred times as long to enter.
    """
    mode = _Counting()
    with mode:
        target(*args, **kwargs)
    return mode.flops, mode.called


class _Counting(TorchDispatchMode):
    """What `FlopCounterMode` does to a call: take it apart as far as it goes, and apply formulas to the pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.called: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            inside = func.decompose(*args, **(kwargs or {}))
        if inside is not NotImplemented:
            return inside
        result = func(*args, **(kwargs or {}))
        formula = registered_formula(func)
        if formula is None:
            self.called.append(func)
        else:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


# ---- regions of a forward: gradients off, autocast, parts compiled or recomputed together

SET_GRAD = torch._C._set_grad_enabled
ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
"""What Dynamo and pre-dispatch tracing write into a graph where a context begins or ends. Public: none."""
ENTER_INFERENCE = torch.autograd.grad_mode._enter_inference_mode
EXIT_INFERENCE = torch.autograd.grad_mode._exit_inference_mode
"""The same for `torch.inference_mode`, in Dynamo's graphs; its context is the call that begins it."""
FUSED_LAYER = torch._transformer_encoder_layer_fwd
FUSED_ATTENTION = torch._native_multi_head_attention
"""What nn.TransformerEncoderLayer and nn.MultiheadAttention call where no gradients are needed. Public: none."""


def region_operator(target: Any) -> str:
    """Return the name of a higher-order operator, which calls graphs, or "" for any other target. Public: none."""
    return str(target.name()) if is_higher_order(target) else ""


def computes(target: Any) -> bool:
    """Return whether a target is one of torch's operators that returns new tensors: no view, nothing in place."""
    return is_operator(target) and not target.is_view and not target._schema.is_mutable


def dispatched(run: Callable[[], Any]) -> tuple[Any, list[tuple[Any, tuple[Any, ...], Any]]]:
    """Return what `run` returns and the operators that it comes down to: (operator, arguments, result) in order.

    Autocast and composite operators are resolved by then. Public: none; `torch.library` dispatches one operator.
    """
    calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            calls.append((func, args, result))
            return result

    with Recorder():
        return run(), calls


# ---- attention


def attention_order(device: torch.device) -> list[Any]:
    """Return the kernels of scaled_dot_product_attention in the order in which torch now tries them on a GPU.

    Torch settles the order when it first chooses a kernel, so one choice is made here before the order is read. It may
    then put cuDNN before flash attention: on Hopper and data centres' Blackwell, with cuDNN above 9.15, since torch
    2.10, unless TORCH_CUDNN_SDPA_DEPRIORITIZED=1. Public: `sdpa_kernel(set_priority=True)` sets an order, and nothing
    reads it.
    """
    query = torch.empty(1, 1, 8, 8, dtype=torch.float16, device=device)
    torch._fused_sdp_choice(query, query, query)
    return cast("list[Any]", attention._cur_sdpa_kernel_backends(with_priority=True))


# ---- logging


def log_artifact(name: str, text: Callable[[], str]) -> None:
    """Put a text into torch's structured trace, for `tlparse`. Public: none."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
