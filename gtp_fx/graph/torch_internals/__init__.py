"""Every private name of torch that this package calls: a function each, with the public name that may replace it.

Modules that take a second or more to import are imported inside the functions that need them. The dictionaries that an
`nn.Module` keeps its parameters in (`_parameters`, `_buffers`, `_modules`) are used directly where modules share them
(`gtp_fx.model`).
"""

from __future__ import annotations

from gtp_fx.graph.torch_internals.compiling import (
    attention_order,
    cache_misses,
    compile_with_inductor,
    compiler_cache,
    folds_weights,
    fresh_compiler_cache,
    inductor_config,
    inductor_modes,
    load_aoti,
    name_memory_formats,
    package_aoti,
)
from gtp_fx.graph.torch_internals.counting import (
    dispatched,
    registered_formula,
    run_counted,
)
from gtp_fx.graph.torch_internals.graphs import (
    ENTER_AUTOCAST,
    ENTER_INFERENCE,
    EXIT_AUTOCAST,
    EXIT_INFERENCE,
    FUSED_ATTENTION,
    FUSED_LAYER,
    SET_GRAD,
    computes,
    copy_parameter_sources,
    decomposes,
    given_to_compile,
    indexing_by_tensors,
    is_functorch,
    is_higher_order,
    is_operator,
    region_operator,
    return_flat,
    take_signature,
)
from gtp_fx.graph.torch_internals.open_sizes import (
    OpenSizes,
)
from gtp_fx.graph.torch_internals.tracing import (
    OUT_OF_MEMORY,
    aot_export,
    decomposition_tables,
    is_traced,
    log_artifact,
    restarts_dynamo,
    trace_functional,
    tracing_lock,
    untraced,
)
from gtp_fx.graph.torch_internals.values import (
    fake_mode,
    fill_values,
    floor_divided,
    has_hint,
    is_fake,
    mode_of,
    open_sizes,
    written_to,
)

__all__ = [
    "ENTER_AUTOCAST",
    "ENTER_INFERENCE",
    "EXIT_AUTOCAST",
    "EXIT_INFERENCE",
    "FUSED_ATTENTION",
    "FUSED_LAYER",
    "OUT_OF_MEMORY",
    "SET_GRAD",
    "OpenSizes",
    "aot_export",
    "attention_order",
    "cache_misses",
    "compile_with_inductor",
    "compiler_cache",
    "computes",
    "copy_parameter_sources",
    "decomposes",
    "decomposition_tables",
    "dispatched",
    "fake_mode",
    "fill_values",
    "floor_divided",
    "folds_weights",
    "fresh_compiler_cache",
    "given_to_compile",
    "has_hint",
    "indexing_by_tensors",
    "inductor_config",
    "inductor_modes",
    "is_fake",
    "is_functorch",
    "is_higher_order",
    "is_operator",
    "is_traced",
    "load_aoti",
    "log_artifact",
    "mode_of",
    "name_memory_formats",
    "open_sizes",
    "package_aoti",
    "region_operator",
    "registered_formula",
    "restarts_dynamo",
    "return_flat",
    "run_counted",
    "take_signature",
    "trace_functional",
    "tracing_lock",
    "untraced",
    "written_to",
]
