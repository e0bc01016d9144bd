"""Parts of a module that replaces another: parameters under its names, its class's name, its forward's signature."""

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
"""From each module of an original to the one that replaces it."""

_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def class_like(base: type[Base], original: type[nn.Module]) -> type[Base]:
    """Return a subclass of `base` with the name of the original's class and its forward's signature.

    Trainers and pipelines read both. There is one subclass for each pair of classes.
    """
    if (base, original) not in _made:
        _made[base, original] = _new_class(base, original)
    return _made[base, original]  # type: ignore[return-value]


class Part(nn.Module):
    """Bare module with the parameters of a module inside the original, under their names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise InputError: only the whole model's graph can run."""
        raise InputError(
            "this is a part of an optimised model: it holds parameters, and the whole model's graph reads them. Call a "
            "method of the model, or optimise the original's part by itself, gtp_fx.optimize(model.part, …)"
        )


def parameter_tree(module: nn.Module, seen: ModuleMap) -> nn.Module:
    """Return a tree of bare modules with the parameters and buffers of `module` under the same names.

    Linear layers remain nn.Linear, because quantisers that replace weights (torchao's) look for that class.

    seen: filled with each module and its bare counterpart; a module used twice gets one.
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
    for name, child in module._modules.items():  # a compiled part has a length only where what it compiles has one
        bare._modules[name] = None if child is None else parameter_tree(child, seen)
    bare.training = module.training
    return bare


def shared_tensors(twins: ModuleMap) -> list[tuple[Tensors, Tensors, str]]:
    """List the tensors that replacements share with the original: (their dict, the original's dict, name in both)."""
    return [
        (mine, theirs, name)
        for module, bare in twins.items()
        for mine, theirs in ((bare._parameters, module._parameters), (bare._buffers, module._buffers))
        for name, value in theirs.items()
        if value is not None and mine.get(name) is value
    ]


def copy_replaced(old: ModuleMap, new: ModuleMap, before: Mapping[nn.Module, Tensors]) -> None:
    """Copy tensors that the caller replaced in `old` (quantised, say) into `new`.

    Only those are copied whose original still holds what it held `before`.
    """
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
    """Return the names of all parameters and buffers; shared ones appear under each of their names."""
    everything = (original.named_parameters(remove_duplicate=False), original.named_buffers(remove_duplicate=False))
    return {name for named in everything for name, _ in named}


def use_parameters_of(graph_module: fx.GraphModule, owner: nn.Module, names: Collection[str]) -> None:
    """Let `graph_module` read all its parameters and buffers from `owner`.

    names: the original's parameters and buffers. Whatever else the graph reads (constants lifted into it) moves to
        `owner`, under a new name where another graph's constant has the same one.
    """
    moved: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target not in names:
            if node.target not in moved:
                moved[node.target] = _move_in(graph_module, node.target, owner)
            node.target = moved[node.target]
    share(graph_module, owner)
    graph_module.recompile()


def share(graph_module: fx.GraphModule, owner: nn.Module) -> None:
    """Give `graph_module` the very same dicts as `owner`, so that whatever is put into one is in the other."""
    graph_module._parameters, graph_module._buffers = owner._parameters, owner._buffers
    graph_module._modules = owner._modules


def _move_in(graph_module: fx.GraphModule, name: str, owner: nn.Module) -> str:
    """Move a constant of the graph into `owner` as a buffer; return its name there."""
    path, _, leaf = name.rpartition(".")
    holder, value = owner.get_submodule(path), getattr(graph_module.get_submodule(path), leaf)
    held: Tensors = {**holder._parameters, **holder._buffers}
    free = itertools.chain([leaf], (f"{leaf}_{number}" for number in itertools.count(1)))
    leaf = next(candidate for candidate in free if candidate not in held or held[candidate] is value)
    holder._buffers[leaf] = value
    holder._non_persistent_buffers_set.add(leaf)
    return f"{path}.{leaf}" if path else leaf


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
