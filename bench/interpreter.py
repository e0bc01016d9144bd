"""Triton's interpreter, which runs kernels on a CPU: import this behind TRITON_INTERPRET=1 and before any kernel runs.

Triton up to 3.6 hands Python the bound of a loop as `int(array)` of an array of one element, which NumPy refuses from
2.4 on; every kernel with `range(count)` fails there. Compiled kernels have no such thing in them.
"""

from __future__ import annotations

import numpy
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _count(out_ptr, times):  # type: ignore[no-untyped-def]
    total = 0
    for _ in range(times):
        total += 1
    tl.store(out_ptr, total)


def make_loops_run() -> None:
    """Mend the interpreter where a loop doesn't run. Raises RuntimeError where that doesn't help."""
    if _loops_run():
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # type: ignore[no-untyped-def]
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    if not _loops_run():
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} runs no loop with numpy {numpy.__version__}: "
            "pip install 'numpy<2.4'"
        )


def _loops_run() -> bool:
    out = torch.zeros(1, dtype=torch.int32)
    try:
        _count[(1,)](out, 3)
    except (InterpreterError, TypeError, AttributeError):
        return False
    return out.tolist() == [3]
