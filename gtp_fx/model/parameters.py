"""Parts of a module that stands for another: its class's name, its forward's signature, its graphs' constants."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from operator import attrgetter
from typing import Any, TypeVar

from torch import fx, nn

from gtp_fx.graph.edit import CONSTANT, constant_names, share

Base = TypeVar("Base", bound=nn.Module)

SHARED = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
"""nn.Module's own dicts: parameters, buffers, modules, hooks."""

_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def class_like(base: type[Base], original: type[nn.Module]) -> type[Base]:
    """Return a subclass of `base` with the name of the original's class and its forward's signature.

    Trainers and pipelines read both. There is one subclass for each pair of classes.
    """
    if (base, original) not in _made:
        _made[base, original] = _new_class(base, original)
    return _made[base, original]  # type: ignore[return-value]


def stand_for(module: nn.Module, original: nn.Module) -> None:
    """Let `module` have the original's parameters, buffers, modules and hooks: the very same dicts, in place."""
    module.__dict__.update({name: value for name, value in vars(original).items() if name in SHARED})


def names_of(module: nn.Module) -> set[str]:
    """Return the names of all parameters and buffers; shared ones appear under each of their names."""
    everything = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {name for named in everything for name, _ in named}


def names_read(graph_module: fx.GraphModule) -> set[str]:
    """Return the names of what a graph reads."""
    return {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}


def read_from(graph_module: fx.GraphModule, owner: nn.Module, names: Collection[str]) -> None:
    """Let `graph_module` read what is in `names` from `owner`, in place.

    Whatever else it reads (constants lifted into it) becomes an attribute of its own, `CONSTANT` and a number.
    """
    constants: dict[str, Any] = {}
    free = constant_names(names.__contains__)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if node.target not in names:
            value = attrgetter(node.target)(graph_module)
            known = next((name for name, constant in constants.items() if constant is value), None)
            node.target = known or next(free)
            constants[node.target] = value
    share(graph_module, owner)
    graph_module.__dict__.update(constants)
    graph_module.recompile()


def lend(graph_module: fx.GraphModule, owner: nn.Module, names: Collection[str]) -> None:
    """Give `graph_module` what `owner` has in place of its own parameters: those that torch prunes or parametrises.

    names: of the parameters and buffers that it reads from `owner` itself, and not from its modules.
    """
    for name in names:
        if name not in owner._parameters and name not in owner._buffers:
            graph_module.__dict__[name] = getattr(owner, name)
        else:
            graph_module.__dict__.pop(name, None)


def top_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Return the names that a graph reads from its owner itself."""
    return tuple(name for name in names_read(graph_module) if "." not in name and not name.startswith(CONSTANT))


def _new_class(base: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """Make the class that `class_like` returns."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    signature = inspect.signature(original.forward)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(named) > 1:  # a graph takes only the arguments that it was captured with
        signature = signature.replace(parameters=named)
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return type(
        original.__name__, (base,), {"forward": forward, "__doc__": base.__doc__, "__module__": base.__module__}
    )
