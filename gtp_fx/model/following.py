"""How an optimised model follows its original: what a change of it means for the graph, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from gtp_fx.capture.hooks import KINDS
from gtp_fx.capture.layers import layer_paths
from gtp_fx.errors import InputError, warn
from gtp_fx.model.rollback import put_back_on_error
from gtp_fx.model.state import State
from gtp_fx.model.watch import NOTHING, Watch

_MOST = 4
"""The most paths that a message lists."""


def must_be_made_anew(state: State, watch: Watch) -> bool:
    """Return whether the graph, or what runs it, has to be made anew before the next run; discard it then.

    Warns of hooks that won't run. Raises InputError where the model was changed in a way that its graph doesn't follow.
    """
    changes = watch.changes()
    if changes is NOTHING:
        return False
    if changes.unheard:
        _refuse_sharded(state.original, changes.unheard)
        tell_of_hooks(changes.unheard)
    if changes.attributes:
        if not state.recapture:
            raise InputError(
                f"{_named(changes.attributes)} changed since this model was optimised, and its graph was made with "
                f"what was there then: change it back, or call gtp_fx.optimize again; with recapture=True, optimize's "
                f"result does so by itself"
            )
        state.forget()
        return True
    # Code that is compiled has the hooks in it that there were.
    if changes.joined or changes.replaced or (changes.hooked and state.compiles):
        state.own_calls |= frozenset(changes.joined)
        state.runners.clear()
        return True
    return False


def changing(state: State, remake: Callable[[], object], do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `do`, which may change the original, and make the graphs anew where it has; return what `do` returns.

    Where that fails, the original is put back as it was.

    remake: makes the graph for evaluation.
    """
    graphs = dict(state.graphs), dict(state.runners), dict(state.methods)
    with put_back_on_error(state.original):
        result = do(*args, **kwargs)
        runners = [runner for form in state.of_each_form for runner in form.runners.values()]
        if any(runner.watch.changes() is not NOTHING for runner in runners):
            state.forget()
            try:
                remake()
            except BaseException:
                state.graphs, state.runners, state.methods = graphs
                raise
    return result


def own_calls(captured: fx.GraphModule, model: nn.Module) -> frozenset[str]:
    """Return the layers that no pass may join with others: those that have hooks or a class of their own.

    Quantisers that replace the weights of a plain layer leave its class; its product may be joined, by how it is run.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    return frozenset(path for path in layer_paths(captured) if path in modules and not _is_plain(modules[path]))


def not_called_whole(paths: Sequence[str]) -> str:
    """Return the message for layers that have hooks or were replaced, and that no graph of the schedule calls."""
    return (
        f"{_named(paths)}: there are hooks now, or other layers, and a graph that calls these as they are can't have "
        f"the schedule that this one was made with: call gtp_fx.optimize again, with them or without"
    )


def tell_of_hooks(paths: Sequence[str]) -> None:
    """Warn that the user's hooks on some modules won't run."""
    warn(
        f"hooks on {_named(paths)} don't run: the optimised graph has no call for that module. Hooks on layers that it "
        f"calls do (linear layers, norms, activations), and forward hooks on modules that optimize was told to tap: "
        f"taps={list(paths[:_MOST])}",
    )


def _is_plain(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.") and not any(vars(module)[name] for name in KINDS)


def _refuse_sharded(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise InputError where a hook is one of those that gather a part's sharded parameters."""
    for path in paths:
        if any(base.__name__ == "FSDPModule" for base in type(model.get_submodule(path)).__mro__):
            raise InputError(
                f"{path} is sharded by itself, and the optimised graph has no call for it at which its parameters "
                f"could be gathered: call fully_shard on the whole model alone"
            )


def _named(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _MOST} more" if len(paths) > _MOST else ""
    return ", ".join(paths[:_MOST]) + more
