"""Code generation for an H100 without one: answers to Inductor's queries of the GPU.

Inductor decides and generates everything before it launches anything, so it only needs fake tensors on "cuda" and a
processor's properties. None of this is a public interface of torch; `tests/test_bench_gpu_traffic.py` fails when a
release changes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2_048,
    max_threads_per_block=1_024,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    warp_size=32,
)
"""Properties of an H100 (SXM, 80 GB), as `torch.cuda.get_device_properties` returns them."""

ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""torch's order of preference on sm_90 with cuDNN above 9.15, as in wheels of torch 2.11 and later (sdp_utils.cpp)."""
CUDNN = 91_900


@contextlib.contextmanager
def absent_h100() -> Iterator[None]:
    """Make torch and Triton generate code for an H100 within the context.

    Only for a process that does nothing else with a GPU, since both cache what they learn about it.
    """
    from torch._dynamo import device_interface

    device_interface.get_interface_for_device("cuda")  # fills the table that is patched
    interface = _interface(device_interface)
    patches = [
        # Inductor's own queries (multiprocessors, registers, capability, bfloat16) go through this one table.
        mock.patch.dict(device_interface.device_interfaces, {"cuda": interface, "cuda:0": interface}),
        # Some bypass it: Triton's TMA support and gtp_fx's own lowering query torch.cuda.
        mock.patch.object(torch.cuda, "get_device_capability", return_value=CAPABILITY),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=PROPERTIES),
        # torch determines the attention kernel that it prefers at the first query, from the driver.
        mock.patch.object(torch, "_fused_sdp_choice", return_value=int(ATTENTION[0])),
        mock.patch.object(torch.nn.attention, "_cur_sdpa_kernel_backends", return_value=list(ATTENTION)),
        mock.patch.object(torch.backends.cudnn, "version", return_value=CUDNN),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(_triton_driver())
        stack.enter_context(_OnHost())
        yield


def _interface(device_interface: Any) -> Any:
    """Return Dynamo's interface to the absent GPU."""

    class Absent(device_interface.CudaInterface):  # type: ignore[misc, name-defined]
        class Worker:
            set_device = staticmethod(lambda device: None)
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: PROPERTIES)

        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: PROPERTIES)
        get_compute_capability = staticmethod(lambda device=None: 10 * CAPABILITY[0] + CAPABILITY[1])
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    return Absent


@contextlib.contextmanager
def _triton_driver() -> Iterator[None]:
    """Replace Triton's driver by one that only knows its target.

    Inductor reads a kernel's intermediate code to see which arguments it writes, and generating that needs the target.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver

    class Absent(GPUDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            """Nothing to load."""

        @classmethod
        def is_active(cls) -> bool:
            return False

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    # Patch the private attribute: reading the public one raises where there is no GPU.
    with mock.patch.object(triton.runtime.driver, "_active", Absent()):
        yield


class _OnHost(TorchFunctionMode):
    """Mode that creates real tensors on the host instead of the absent GPU. Fake tensors stay on "cuda".

    Inductor creates real ones for folded constants and for operands whose properties it checks. Their values are the
    same on the host.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _get_current_dispatch_mode() is None and str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


@dataclass(frozen=True)
class FakeModel:
    """A model whose parameters are fake tensors on "cuda", so that its size takes no memory.

    module: the model, in eval mode.
    mode: fake mode of its tensors, in which inputs have to be made.
    """

    module: nn.Module
    mode: FakeTensorMode

    def images(self, batch: int, side: int, dtype: torch.dtype) -> Tensor:
        """Return fake images [batch, 3, side, side]."""
        with self.mode:
            return torch.empty(batch, 3, side, side, dtype=dtype, device="cuda")


def fake_on_gpu(module: nn.Module) -> FakeModel:
    """Replace the parameters and buffers of `module`, which is on "meta", by fake ones on "cuda", in place."""
    mode = FakeTensorMode()
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None:
                    with mode:
                        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
                    held[name] = nn.Parameter(fake, requires_grad=False) if isinstance(value, nn.Parameter) else fake
    return FakeModel(module.eval(), mode)
