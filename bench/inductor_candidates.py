"""Options of Inductor that may pay on a target: what to measure there, and nothing that was.

A target's own row (`Target.inductor`) stays empty until `bench.inductor_options` shows on that processor that one does.
"""

from __future__ import annotations

from typing import Any

Patches = dict[str, Any]

_GEMM: Patches = {"max_autotune_gemm": True}
_DESCENT: Patches = {"coordinate_descent_tuning": True}
_HOPPER: dict[str, Patches] = {
    "autotuned gemm": _GEMM,
    # GELU as the product's epilogue saves a pass over eight times the stream; the best few templates are timed with it.
    "autotuned gemm, TMA": {
        **_GEMM,
        "triton.enable_persistent_tma_matmul": True,
        "max_epilogue_benchmarked_choices": 3,
    },
    "coordinate descent": _DESCENT,
    "dependent launch": {"triton.enable_pdl": True},  # for batches so small that launches count
}

CANDIDATES: dict[str, dict[str, Patches]] = {
    "h200": _HOPPER,
    "h100": _HOPPER,
    "a100": {"autotuned gemm": _GEMM, "coordinate descent": _DESCENT},
    "l4": {"autotuned gemm": _GEMM, "coordinate descent": _DESCENT},
    "rtx4090": {"autotuned gemm": _GEMM, "coordinate descent": _DESCENT},
    "generic-gpu": {"autotuned gemm": _GEMM, "coordinate descent": _DESCENT},
    "cpu": {
        "max autotune": {"max_autotune": True},
        "contracted": {"cpp.enable_floating_point_contract_flag": "fast"},
        "frozen": {"freezing": True},
        # C++ templates of products, with what follows them as epilogues, are only for weights that are constant.
        "frozen, max autotune": {"freezing": True, "max_autotune": True},
    },
}
"""By the target's name and the candidate's: as `torch.compile(options=…)` takes them, but for "freezing"."""
