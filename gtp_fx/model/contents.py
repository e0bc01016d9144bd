"""What a graph of a model rests on: its modules, plain attributes and tensors, to tell whether any was changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gtp_fx.capture.snapshots import attributes_of, snapshot


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything that a graph of a model may rest on. Holds what it names, so that nothing new can be taken for it."""

    modules: dict[str, nn.Module]
    attributes: dict[nn.Module, Any]
    tensors: dict[nn.Module, dict[str, Tensor | None]]

    @classmethod
    def of(cls, model: nn.Module) -> Contents:
        modules = dict(model.named_modules())
        return cls(
            modules,
            {module: snapshot(attributes_of(module), objects=True) for module in modules.values()},
            {module: {**module._parameters, **module._buffers} for module in modules.values()},
        )

    def same(self, other: Contents) -> bool:
        """Modules are equal when they are the same; so have tensors to be."""
        return (
            self.modules == other.modules
            and self.attributes == other.attributes
            and all(_identical(held, other.tensors[module]) for module, held in self.tensors.items())
        )


def _identical(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    return one.keys() == other.keys() and all(value is other[name] for name, value in one.items())
