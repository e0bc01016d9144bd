"""Standing in for a module: its parameters under its names, its class's name, its forward's signature."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import fx, nn

from gtp_fx.errors import InputError

Base = TypeVar("Base", bound=nn.Module)
Tensors = dict[str, Any]
ModuleMap = dict[nn.Module, nn.Module]
"""By the modules of an original, those that stand for them."""

_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def class_like(base: type[Base], original: type[nn.Module]) -> type[Base]:
    """A subclass of `base` by the name of the original's class, with its forward's signature: Trainers and pipelines ask for both.

    One for each class of models.
    """
    if (base, original) not in _made:
        _made[base, original] = _new_class(base, original)
    return _made[base, original]  # type: ignore[return-value]


class Part(nn.Module):
    """The parameters of a module inside the original, under their names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(
            "this is a part of an optimised model: it holds parameters, and the whole model's graph runs them. Call a method of the "
            "model, or optimise the original's part by itself, gtp_fx.optimize(model.part, …)"
        )


def parameter_tree(module: nn.Module, seen: ModuleMap) -> nn.Module:
    """Bare modules with the parameters and buffers of `module` under the same names.

    Linear layers stay what they are: that is how a quantiser that replaces weights (torchao's) finds them.
    """
    if module in seen:
        return seen[module]
    bare: nn.Module = Part()
    seen[module] = bare
    if type(module) is nn.Linear:
        bare.__class__ = nn.Linear
        bare.__dict__.update(in_features=module.in_features, out_features=module.out_features)
    bare._parameters.update(module._parameters)
    bare._buffers.update(module._buffers)
    bare._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    bare._modules.update({name: child and parameter_tree(child, seen) for name, child in module._modules.items()})
    bare.training = module.training
    return bare


def shared_tensors(twins: ModuleMap) -> list[tuple[Tensors, Tensors, str]]:
    """Where a stand-in has the original's very own tensors: its dict, the original's, and their name in both."""
    return [
        (mine, theirs, name)
        for module, bare in twins.items()
        for mine, theirs in ((bare._parameters, module._parameters), (bare._buffers, module._buffers))
        for name, value in theirs.items()
        if value is not None and mine.get(name) is value
    ]


def copy_replaced(old: ModuleMap, new: ModuleMap, before: Mapping[nn.Module, Tensors]) -> None:
    """Of what an original held `before` and still holds, the modules of `new` get what those of `old` had in its place."""
    for module in old.keys() & new.keys():
        held = before.get(module, {})
        pairs: tuple[tuple[Tensors, Tensors], ...] = (
            (old[module]._parameters, new[module]._parameters),
            (old[module]._buffers, new[module]._buffers),
        )
        for mine, fresh in pairs:
            fresh.update(
                {name: mine[name] for name, value in fresh.items() if name in mine and value is held.get(name)}
            )


def names_of(original: nn.Module) -> set[str]:
    """Of its parameters and buffers, shared ones by each of their names."""
    everything = (original.named_parameters(remove_duplicate=False), original.named_buffers(remove_duplicate=False))
    return {name for named in everything for name, _ in named}


def use_parameters_of(graph_module: fx.GraphModule, owner: nn.Module, names: Collection[str]) -> None:
    """Let `graph_module` read everything from `owner`. names: the original's; what else the graph reads (constants that were lifted into it)
    moves there, under another name where another graph's constant has that."""
    moved: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target not in names:
            if node.target not in moved:
                moved[node.target] = _move_in(graph_module, node.target, owner)
            node.target = moved[node.target]
    share(graph_module, owner)
    graph_module.recompile()


def share(graph_module: fx.GraphModule, owner: nn.Module) -> None:
    """The very same dicts, so that whatever is put into one is in the other."""
    graph_module._parameters, graph_module._buffers = owner._parameters, owner._buffers
    graph_module._modules = owner._modules


def _move_in(graph_module: fx.GraphModule, name: str, owner: nn.Module) -> str:
    """A constant of the graph's into `owner`; returns what it is called there."""
    path, _, leaf = name.rpartition(".")
    holder, value = owner.get_submodule(path), getattr(graph_module.get_submodule(path), leaf)
    held: Tensors = {**holder._parameters, **holder._buffers}
    free = itertools.chain([leaf], (f"{leaf}_{number}" for number in itertools.count(1)))
    leaf = next(candidate for candidate in free if candidate not in held or held[candidate] is value)
    holder._buffers[leaf] = value
    holder._non_persistent_buffers_set.add(leaf)
    return f"{path}.{leaf}" if path else leaf


def _new_class(base: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    signature = inspect.signature(original.forward)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(named) > 1:  # a graph takes no arguments but those that it was captured with
        signature = signature.replace(parameters=named)
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return type(
        original.__name__, (base,), {"forward": forward, "__doc__": base.__doc__, "__module__": base.__module__}
    )
