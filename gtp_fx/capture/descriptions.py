"""Arguments of a call in words: each in one short line, a whole call as its form.

Numbers are shown by their dtype and shape, but for integers that a graph may be made for, and which `holds_values`
tells: their values are part of the form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gtp_fx.graph.torch_internals import is_fake

_MOST_VALUES = 4096
"""The most entries of an input whose values a graph may be made for; they are compared at every call."""
_RANK = 2
"""The most dimensions of such an input: sizes by image, lengths, a mask of tokens; and no picture in whole numbers."""


def shown(value: Any, tensor: Callable[[Tensor], str] | None = None) -> str:
    """Return a value in one short line: what holds numbers by its type, dtype and shape; of a failing repr, its class.

    tensor: shows a tensor in another way.
    """
    text = _text(value, tensor or (lambda held: f"{dtype_name(held)}{list(held.shape)}"))
    return text if len(text) <= 200 else f"{text[:200]}…"


def _text(value: Any, tensor: Callable[[Tensor], str]) -> str:
    if isinstance(value, Tensor):
        return tensor(value)
    if type(value) in (list, tuple):
        inside = ", ".join(_text(part, tensor) for part in value)
        return f"[{inside}]" if type(value) is list else f"({inside}{',' * (len(value) == 1)})"
    if type(value) is dict:
        return "{" + ", ".join(f"{key!r}: {_text(part, tensor)}" for key, part in value.items()) + "}"
    if is_array(value):
        return f"{type(value).__module__.partition('.')[0]}.{type(value).__name__} {value.dtype}{list(value.shape)}"
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__}>"


def is_array(value: Any) -> bool:
    """Return whether a value is another library's array, of which torch.as_tensor makes a tensor."""
    return not isinstance(value, Tensor | type) and all(hasattr(value, name) for name in ("shape", "dtype"))


def dtype_name(value: Tensor) -> str:
    """Return the name of a tensor's dtype, "float32"."""
    return str(value.dtype).removeprefix("torch.")


def holds_values(leaf: Any) -> bool:
    """Return whether an argument is a tensor of integers, few enough for a graph to be made for their values."""
    few = isinstance(leaf, Tensor) and not leaf.is_meta and leaf.ndim <= _RANK and leaf.numel() <= _MOST_VALUES
    return few and not (leaf.is_floating_point() or leaf.is_complex())


def describe(args: tuple[Any, ...], kwargs: dict[str, Any], fixed: bool = False) -> str:
    """Return the arguments' form as text, with * for the batch: "(float32[*, 3, 224, 224])".

    fixed: with every size, and the values of integer tensors: "(float32[64, 384], grid_thw=int64 [[1, 8, 8]])".
    """

    def of_any_batch(value: Tensor) -> str:
        if fixed and holds_values(value) and not is_fake(value):
            return f"{dtype_name(value)} {value.tolist()}"
        sizes = [str(size) for size in value.shape]
        return f"{dtype_name(value)}[{', '.join(sizes if fixed else ['*', *sizes[1:]]) if value.ndim else ''}]"

    parts = [shown(v, of_any_batch) for v in args] + [f"{k}={shown(v, of_any_batch)}" for k, v in kwargs.items()]
    return f"({', '.join(parts)})"
