"""Compiles every launch that the kernels' operators make, for GPUs that aren't there: run as a program, by test_kernels.

Prints a line for each: operator, compute capability, registers spilled (bytes of stack), bytes of shared memory. Before that, for each launch
of a model traced as a compiler does: "written", its kernel, and the arguments that the compiler takes for written.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

CAPABILITIES = (80, 89, 90)


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


def launches() -> Iterator[tuple[str, Any]]:
    """A name, and what makes the launches: attention of ordinary and awkward sizes, and the others."""
    from gtp_fx.kernels import attention, propagate, recover, scores, select, token_graph

    half, single = torch.bfloat16, torch.float32
    sizes = [(197, 64, half), (577, 64, half), (49, 32, half), (4096, 80, half), (197, 64, single), (4096, 80, single)]
    for tokens, head, dtype in sizes:
        q, k, v = torch.empty(2, tokens, 3, 2, head, dtype=dtype).permute(2, 0, 3, 1, 4)
        scales = torch.empty(2, tokens - 1)
        bias = torch.empty(1, 2, tokens, tokens, dtype=dtype) if tokens == 49 else None
        call = (q, k, v, bias, scales, None, None, "mixed-max", 1, 0, [])
        yield f"attend {tokens} {head} {dtype}", lambda call=call: attention.attend._init_fn(*call)
    q, k, v = torch.empty(1, 30, 3, 1, 64, dtype=half).permute(2, 0, 3, 1, 4)  # sizes of 1 are constants to Triton
    seen, told = torch.ones(1, 1, 1, 30, dtype=torch.bool), torch.empty(1, 29)
    for name, scales, thresholds, score, tile in (
        ("cls", None, None, "cls-max", []),
        ("tiled-cls", told, None, "cls-max", [64, 16, 4, 2]),
        ("thresholds", told, [0.1], "mixed-max", []),
        ("tiled-thresholds", told, [0.1], "mixed-max", [64, 16, 4, 2]),
        ("one-query", told, None, "none", []),
    ):
        asking = q[:, :, :1] if score == "none" else q
        call = (asking, k, v, seen, scales, thresholds, None, score, 1, 0, tile)
        yield f"attend {name}", lambda call=call: attention.attend._init_fn(*call)
    for tokens, head, score in (
        (197, 64, "mixed-max"),
        (577, 64, "mixed-max"),
        (1370, 64, "broadcast-mean"),
        (197, 80, "mixed-max"),
    ):
        q, k, _ = torch.empty(2, tokens, 3, 2, head, dtype=half).permute(2, 0, 3, 1, 4)
        told = None if score == "broadcast-mean" else torch.empty(2, tokens - 1)
        given = (q, k, torch.empty(2, 2, tokens), None, score, 1, 0, told)
        yield f"scores {tokens} {head} {score}", lambda given=given: scores.attention_scores._init_fn(*given)
    lone = (q[:1, :1, :30], k[:1, :1, :30], torch.empty(1, 1, 30), 0.125, "cls-max", 1, 0, None)
    yield "scores cls", lambda: scores.attention_scores._init_fn(*lone)
    for images, grid, channels, neighbors, kind, dtype in (
        (48, [14, 14], 384, 8, "mixed", half),
        (8, [37, 37], 768, 16, "semantic", torch.float16),
        (1, [4, 8, 8], 1280, 8, "mixed", half),
        (2, [24, 24], 1024, 8, "mixed", single),
    ):
        call = (torch.empty(images, 1 + math.prod(grid), channels, dtype=dtype), grid, 1, kind, neighbors)
        yield f"token_graph {grid} {dtype}", lambda call=call: token_graph.token_graph._init_fn(*call)
    yield from _sites(select.select._init_fn, recover.recover._init_fn)
    yield from _propagations(propagate.propagate._init_fn)


def _sites(select: Any, recover: Any) -> Iterator[tuple[str, Any]]:
    """Of 150 of 14 x 14 patches 20 leave; and where one token is all there is of something."""
    place, score = torch.empty(2, 196, dtype=torch.int32), torch.empty(2, 150)
    kept, left, one = (torch.empty(2, size, dtype=torch.int64) for size in (130, 20, 1))
    x = torch.empty(2, 151, 384, dtype=torch.bfloat16)
    yield "select", lambda: select(score, place, 20, 196)
    yield "select whole", lambda: select(score[:1], None, 149, 150)
    yield "recover", lambda: recover(x[:, 20:], torch.empty(2, 20, 130), None, x, kept, left, 1, 0)
    places = torch.empty(2, 150, 2, dtype=torch.int64)
    yield "recover windows", lambda: recover(x[:, 21:], None, places, None, kept, left, 0, 0)
    yield "recover one", lambda: recover(x[:, :1], None, places[:1, :2], x[:, :2], one, one, 0, 0)


def _propagations(propagate: Any) -> Iterator[tuple[str, Any]]:
    """Sites of 14 x 14 patches by width and graph, with all that they may be asked for and with little; every tile of one width."""
    from gtp_fx.kernels.tiles import propagation_tiles

    place, scales = torch.empty(2, 196, dtype=torch.int32), torch.empty(2, 150)
    near, degree = torch.empty(2, 196, 8, dtype=torch.int64), torch.empty(2, 196)
    kept, left, one = (torch.empty(2, size, dtype=torch.int64) for size in (130, 20, 1))
    chosen = (kept, left, kept, left, place)
    for channels in (384, 768, 1024):
        x = torch.empty(2, 151, channels, dtype=torch.bfloat16)
        norm = (x[0, 0], x[0, 0])
        for kind in ("mixed", "spatial"):
            told = (near, degree, *chosen, scales, *norm, [14, 14], kind, 0.1, 1, 1e-6, True, [])
            yield f"propagate {channels} {kind}", lambda x=x, told=told: propagate(x, x.clone(), *told)
    for tile in propagation_tiles(768)[1:]:
        told = (near, degree, *chosen, scales, *norm, [14, 14], "mixed", 0.1, 1, 1e-6, True, tile.arguments)
        yield f"propagate {tile}", lambda x=x, told=told: propagate(x, x.clone(), *told)
    told = (near, degree, *chosen, scales, *norm, [14, 14], "mixed", 0.1, 1, 1e-6, True, [])
    yield "propagate 1024 scaled", lambda: propagate(x, x.clone(), *told, x[0, 0])
    deep = (None, None, None, [4, 7, 7], "spatial", 0.1, 0, -1.0, False, [])
    few = (near[..., :0], degree, one, one, one, one, place)
    yield "propagate deep", lambda: propagate(x[:, :3], None, *few, *deep)
    similar = (None, norm[0], None, [196], "semantic", 0.1, 1, 1e-6, True, [])
    yield "propagate similar", lambda: propagate(x, None, near, degree, *chosen, *similar)


def resources(kernel: Any) -> tuple[int, int]:
    """Stack bytes a thread (registers spilled) and shared memory of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    stack = re.search(r"STACK:(\d+)", listed.stdout)
    assert stack is not None, listed.stdout
    return int(stack[1]), kernel.metadata.shared


def written() -> Iterator[tuple[str, list[str]]]:
    """As a compiler traces a model in kernels: each launch's kernel, and which of its arguments it takes for written.

    Where Triton's code can't be analysed that is all of them, and every one would be copied before the launch.
    """
    import timm
    from torch._functorch.aot_autograd import aot_export_module
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    import gtp_fx
    from gtp_fx.passes.lower.triton_kernels import lower_to_kernels

    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0, global_pool="")  # a token map
    fast = gtp_fx.optimize(model, schedule=[20, 30, 0], compile=False)
    kernels = lower_to_kernels(fast.graph_module)
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
    for node in traced.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            yield getattr(kernel, "fn", kernel).__name__, list(node.kwargs["tensors_to_clone"])


def main() -> None:
    made: list[Any] = []

    class Compiling:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: made.append(self.kernel.warmup(*args, grid=grid, **options))

    triton.runtime.driver.set_active(Absent(CAPABILITIES[-1]))
    for kernel, arguments in written():
        print(f"written {kernel} {','.join(sorted(arguments))}", flush=True)
    from gtp_fx.kernels import attention, propagate, recover, scores, select, token_graph

    for module in (attention, propagate, recover, scores, select, token_graph):
        module.launcher = Compiling  # type: ignore[attr-defined]
    for capability in CAPABILITIES:
        triton.runtime.driver.set_active(Absent(capability))
        for name, launch in launches():
            made.clear()
            launch()
            for kernel in made:
                stack, shared = resources(kernel)
                print(f"{name.replace(' ', '-')} {capability} {stack} {shared}", flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1"
    main()
