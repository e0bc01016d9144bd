"""Contents of a model that its graphs depend on (modules, plain attributes, tensors), to tell whether any changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gtp_fx.capture.snapshots import attributes_of, snapshot


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything in a model that a graph of it may depend on.

    It keeps the objects alive, so that a new object can't get the address of an old one and pass for it.

    modules: the model's modules by name.
    attributes: each module's snapshot of its plain attributes.
    tensors: each module's parameters and buffers by name.
    """

    modules: dict[str, nn.Module]
    attributes: dict[nn.Module, Any]
    tensors: dict[nn.Module, dict[str, Tensor | None]]

    @classmethod
    def of(cls, model: nn.Module) -> Contents:
        """Record the contents of `model` as they are now."""
        modules = dict(model.named_modules())
        return cls(
            modules,
            {module: snapshot(attributes_of(module), objects=True) for module in modules.values()},
            {module: {**module._parameters, **module._buffers} for module in modules.values()},
        )

    def same(self, other: Contents) -> bool:
        """Tell whether both hold the same modules and tensors, by identity, and equal attributes."""
        return (
            self.modules == other.modules
            and self.attributes == other.attributes
            and all(_identical(held, other.tensors[module]) for module, held in self.tensors.items())
        )


def _identical(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    """Tell whether both have the same names and, under each, the very same tensor."""
    return one.keys() == other.keys() and all(value is other[name] for name, value in one.items())
