"""Inputs whose values a graph is made for: sizes of packed images, by which a forward splits, loops and indexes.

A forward that takes several images in one sequence reads from a small tensor of integers how large each is. A graph has
one control flow, so it is made for one such tensor: while the forward is traced, what is computed of that tensor and of
plain numbers alone is computed for real, and every question (`tolist`, `item`, a length, a mask's count) is answered.
Where such a value meets one that is traced, it is a constant of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from gtp_fx.capture.called_as import CalledAs
from gtp_fx.capture.descriptions import holds_values
from gtp_fx.capture.signatures import CallSignature
from gtp_fx.errors import CaptureError
from gtp_fx.graph.nodes import names_in_place
from gtp_fx.graph.torch_internals import untraced

_FACTORIES = frozenset(
    {torch.arange, torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.full, torch.eye, torch.linspace}
)
"""Functions that make a tensor of plain numbers, always the same."""

_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "poisson", "dropout", "uniform", "exponential", "empty")
"""Parts of names of functions whose results no argument determines."""


def with_known_values(model: nn.Module, signature: CallSignature) -> nn.Module:
    """Return a view of `model` whose forward takes the signature's own values for those that it holds.

    To be traced, and called with the signature's examples.
    """
    leaves, form = pytree.tree_flatten((signature.args, signature.kwargs))
    held = {number: leaf for number, leaf in enumerate(leaves) if holds_values(leaf)}

    def forward(*args: Any, **kwargs: Any) -> Any:
        given, given_form = pytree.tree_flatten((args, kwargs))
        assert given_form == form, "the forward is traced with the signature's own arguments"
        with untraced():
            known = {number: leaf.clone() for number, leaf in held.items()}
        own, named = pytree.tree_unflatten([known.get(number, leaf) for number, leaf in enumerate(given)], form)
        with _KnownValues(known.values()):
            output = model(*own, **named)
        if any(tensor._version for tensor in known.values()):
            raise CaptureError(f"{model._get_name()} writes to a tensor of integers that it is called with")
        return output

    return CalledAs(model, forward, signature.parameters)


class _KnownValues(TorchFunctionMode):
    """Computes what depends on known tensors and plain numbers alone for real, while everything else is traced.

    A known tensor is an ordinary one that has numbers. The first time that one meets a traced value, a traced copy is
    made, and is used from then on wherever it does so again.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._copies: Any = WeakTensorKeyDictionary()
        """By known tensor: the number of writes to it at which its copy was made, and the copy; (0, None) before."""
        self._written: Any = WeakTensorKeyDictionary()
        """Tensors that were known until something traced was written into them, and what stands for each."""
        for tensor in known:
            self._copies[tensor] = 0, None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = self._with_plain_slices((args, dict(kwargs or {})))
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = [tensor for tensor in tensors if self._is_known(tensor)]
        symbolic = any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves)
        if len(known) == len(tensors) and not symbolic and _is_determined(func):
            if tensors:
                return self._computed(func, args, kwargs)
            if func in _FACTORIES:
                made = self._computed(func, args, kwargs)
                if not made.is_floating_point() and not made.is_complex():
                    return made
        if not tensors:
            return func(*args, **kwargs)
        self._refuse_aliases(func, args, kwargs)
        written = _written_to(func, args, kwargs)
        own, named = pytree.tree_map_only(Tensor, self._traced, (args, kwargs))
        result = func(*own, **named)
        for tensor in written:
            if self._is_known(tensor):
                self._written[tensor] = self._copies.pop(tensor)[1]
        return result

    def _is_known(self, tensor: Tensor) -> bool:
        return tensor in self._copies

    def _computed(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function for real; the tensors that it returns are known."""
        with untraced():
            result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf not in self._copies:
                self._copies[leaf] = 0, None
        return result

    def _traced(self, tensor: Tensor) -> Tensor:
        """Return what stands for a tensor where a traced one is read: a copy, as a constant, of a known one."""
        if tensor in self._written:
            return self._written[tensor]  # type: ignore[no-any-return]
        if not self._is_known(tensor):
            return tensor
        writes, copy = self._copies[tensor]
        if copy is None or writes != tensor._version:
            with untraced():
                constant = tensor.clone()
            copy = constant.clone()
            self._copies[tensor] = tensor._version, copy
        return copy  # type: ignore[no-any-return]

    def _with_plain_slices(self, arguments: Any) -> Any:
        """Return arguments with numbers in place of known tensors in slices: of `x[:n]`."""

        def plain(leaf: Any) -> Any:
            if not isinstance(leaf, slice):
                return leaf
            ends = (leaf.start, leaf.stop, leaf.step)
            with untraced():
                return slice(*(int(end) if isinstance(end, Tensor) and self._is_known(end) else end for end in ends))

        return pytree.tree_map(plain, arguments, is_leaf=lambda leaf: isinstance(leaf, slice))

    def _refuse_aliases(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Raise CaptureError where a traced value is written into a known tensor that another one is a view of."""
        for tensor in _written_to(func, args, kwargs):
            if not self._is_known(tensor):
                continue
            memory = tensor.untyped_storage().data_ptr()
            others = [other for other in self._copies if other is not tensor]
            if any(other.untyped_storage().data_ptr() == memory for other in others):
                raise CaptureError(
                    f"{resolve_name(func) or func} writes a value that depends on the images into a tensor of "
                    f"{list(tensor.shape)} of which the forward has a view, which isn't followed"
                )


def _is_determined(func: Callable[..., Any]) -> bool:
    """Return whether a function's arguments determine its result."""
    name = getattr(func, "__name__", "")
    return not any(part in name for part in _RANDOM)


def _written_to(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a call writes to, by the function's name and `out=`."""
    first = args[:1] if names_in_place(getattr(func, "__name__", "")) else ()
    return [leaf for leaf in pytree.tree_leaves((first, kwargs.get("out"))) if isinstance(leaf, Tensor)]
