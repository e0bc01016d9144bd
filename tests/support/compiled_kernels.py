"""Compile the launches of `kernel_launches` for absent GPUs. test_kernels runs this as a program, "nets" or "awkward".

Prints a line of JSON for each kernel of each launch and compute capability, a `Compiled`. For the nets follows a line
for each launch of a model traced as a compiler does: the kernel and the arguments that the compiler takes for written,
{"kernel": …, "written": […]}.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

from support.kernel_launches import AWKWARD, NETS, Launch

CAPABILITIES = (80, 89, 90)
MULTIPROCESSOR = {80: (164, 32, 64), 89: (100, 24, 48), 90: (228, 32, 64)}
"""Shared memory in KiB, resident blocks and warps, by compute capability, from the CUDA C++ Programming Guide."""
_REGISTERS = 65_536
"""Of a multiprocessor of any of them; a warp gets them by 256. Every block takes 1 KiB of shared memory for itself."""


@dataclass(frozen=True)
class Compiled:
    """Resources that a kernel needs: registers and stack bytes (spills) a thread, shared bytes and warps a block.

    name: the kernel's, and of what launch.
    """

    name: str
    capability: int
    registers: int
    stack: int
    shared: int
    warps: int

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds at a time."""
        shared, blocks, warps = MULTIPROCESSOR[self.capability]
        of_a_warp = -(-self.registers * 32 // 256) * 256
        return min(
            blocks,
            warps // self.warps,
            _REGISTERS // (of_a_warp * self.warps),
            shared * 1024 // (self.shared + 1024),
        )


class Absent(GPUDriver):
    """A driver of no GPU: says what to compile for, and launches nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def compiled(which: tuple[int, Callable[[], Iterator[Launch]], int]) -> list[Compiled]:
    """A launch's kernels. which: the compute capability, what yields the launch, and its place there."""
    capability, make, place = which
    made: list[Any] = []

    class Compiling:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: made.append(self.kernel.warmup(*args, grid=grid, **options))

    from gtp_fx import kernels

    for _, name, _ in pkgutil.iter_modules(kernels.__path__):
        module: Any = importlib.import_module(f"gtp_fx.kernels.{name}")
        if name != "launch" and hasattr(module, "launcher"):
            module.launcher = Compiling
    triton.runtime.driver.set_active(Absent(capability))
    name, launch = list(make())[place]
    launch()
    return [resources(name, capability, kernel) for kernel in made]


def resources(launch: str, capability: int, kernel: Any) -> Compiled:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (re.search(rf"\b{key}:(\d+)", listed.stdout) for key in ("REG", "STACK"))
    assert registers is not None and stack is not None, listed.stdout
    about = kernel.metadata
    kernel_name = about.name.removesuffix("_kernel")
    return Compiled(
        f"{kernel_name} {launch}", capability, int(registers[1]), int(stack[1]), about.shared, about.num_warps
    )


def written() -> list[dict[str, Any]]:
    """As a compiler traces a model in kernels: each launch's kernel, and which of its arguments it takes for written.

    Where Triton's code can't be analysed that is all of them, and every one would be copied before the launch.
    """
    import timm
    from torch._functorch.aot_autograd import aot_export_module
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    import gtp_fx
    from gtp_fx.passes.lower.triton_kernels import triton_kernels

    triton.runtime.driver.set_active(Absent(CAPABILITIES[-1]))
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0, global_pool="")  # a token map
    fast = gtp_fx.optimize(model, schedule=[20, 30, 0], strategy=gtp_fx.GTP.paper(), compile=False)
    kernels = triton_kernels(fast.graph_module)
    state = dict([*kernels.named_parameters(), *kernels.named_buffers()])
    with FakeTensorMode(), torch.no_grad():
        fakes = [torch.empty(2, 3, 224, 224)]
        fakes += [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for v in state.values()]
        fakes = [fake.bfloat16() if fake.is_floating_point() else fake for fake in fakes]

    class Whole(torch.nn.Module):
        def forward(self, x: Tensor, *values: Tensor) -> tuple[Tensor]:
            return (torch.func.functional_call(kernels, dict(zip(state, values, strict=True)), (x,)),)

    with torch.no_grad():
        traced, _ = aot_export_module(Whole(), fakes, trace_joint=False)
    found = []
    for node in traced.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            found.append({"kernel": getattr(kernel, "fn", kernel).__name__, "written": node.kwargs["tensors_to_clone"]})
    return found


def main(family: str) -> None:
    places = [(make, place) for make in (NETS if family == "nets" else AWKWARD) for place, _ in enumerate(make())]
    # Ada's code is Ampere's but for the assembler.
    capabilities = CAPABILITIES if family == "nets" else (CAPABILITIES[0], CAPABILITIES[-1])
    # Forked once torch is loaded: spawned processes would each load it again. Compiling is one thread's work.
    workers = min(len(os.sched_getaffinity(0)), 16)
    # Tracing comes first, before a process replaces what launches kernels.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        traced = pool.submit(written) if family == "nets" else None
        for found in pool.map(compiled, [(capability, *place) for capability in capabilities for place in places]):
            print(*(json.dumps(asdict(kernel)) for kernel in found), sep="\n", flush=True)
        for kernel in traced.result() if traced else ():
            print(json.dumps(kernel))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1"
    main(sys.argv[1])
