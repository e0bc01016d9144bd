"""Inductor: its options, what it compiles, where it keeps that, and which attention torch takes."""

from __future__ import annotations

import contextlib
import copyreg
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch.nn import attention


def compile_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile with Inductor a graph that a backend was given. Public: `torch.compile`, which traces anew."""
    compile_fx = importlib.import_module("torch._inductor.compile_fx").compile_fx
    return cast("Callable[..., Any]", compile_fx(gm, list(inputs), config_patches=dict(options)))


def inductor_config() -> dict[str, Any]:
    """Return every option of Inductor with its value. Public: `torch._inductor.list_options`, names alone."""
    config: Any = importlib.import_module("torch._inductor.config")
    return dict(config.get_config_copy())


def folds_weights() -> bool:
    """Return whether Inductor makes constants of weights (`torch._inductor.config.freezing`). Public: none."""
    return bool(importlib.import_module("torch._inductor.config").freezing)


def compiles_ahead() -> bool:
    """Return whether what is compiled now is to be written to a file whole, as by `torch.compile(…).aot_compile`.

    Public: none.
    """
    return bool(importlib.import_module("torch._functorch.config").bundled_autograd_cache)


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
