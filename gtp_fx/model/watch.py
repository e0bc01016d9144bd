"""What a model's graph takes for granted, compared before each run: attributes, modules, hooks.

A graph reads parameters when it runs, and calls layers as they are then. All else was read once, where the model was
captured: a flag, a number, which modules there are. Each dict that holds such things is compared with a copy, which
takes some fifty nanoseconds where nothing has changed, since Python compares by identity first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gtp_fx.capture.hooks import KINDS, added_hooks, user_hooks
from gtp_fx.capture.snapshots import OWN, inside, is_same


@dataclass
class _Seen:
    """A dict or list, and the copy it is compared with.

    path: where it is, for messages.
    ignored: keys that may change.
    """

    live: Any
    saved: Any
    path: str
    ignored: Collection[str] = ()

    def changed(self) -> list[str]:
        """Return the paths of what isn't as it was; what was only added is taken as seen."""
        if isinstance(self.live, list):
            return [] if is_same(self.live, self.saved) else [self.path]
        gone = [key for key, value in self.saved.items() if not is_same(self.live.get(key, self), value)]
        gone = [key for key in gone if key not in self.ignored]
        if not gone:
            self.saved = dict(self.live)
        return [f"{self.path}.{key}".removeprefix(".") for key in gone]


@dataclass(frozen=True)
class Changes:
    """What a model has now that its graph doesn't follow by itself.

    attributes: paths of attributes and modules that forward may read, and that aren't as they were.
    replaced: paths of layers that the graph calls, in whose place others stand.
    joined: paths of layers whose parameters the graph reads itself, and that were replaced or have hooks now.
    unheard: paths of modules that the graph doesn't call and on which hooks were set since.
    hooked: whether hooks were set or removed anywhere, also on layers that are called.
    """

    attributes: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    unheard: tuple[str, ...] = ()
    hooked: bool = False


NOTHING = Changes()


class Watch:
    """Everything in a model that its graph was made from and doesn't read when it runs.

    called: paths of the layers that the graph calls: what they hold, and which they are, is their own affair.
    joined: paths of modules whose parameters the graph reads itself.
    written: paths of the attributes that the model's own forward sets.
    used: paths of the modules that forward calls or reads, and of those that hold them; None for all.
    tapped: paths of modules whose forward hooks fire with what the graph returns of them.
    """

    def __init__(
        self,
        model: nn.Module,
        called: Collection[str],
        joined: Collection[str],
        written: Collection[str] = (),
        used: Collection[str] | None = None,
        tapped: Collection[str] = (),
    ) -> None:
        self._model, self.called, self._joined, self._tapped = model, called, joined, tapped
        self._seen: list[_Seen] = []
        self._hooks: list[dict[int, Any]] = []
        known: set[int] = set()
        for path, module in _modules(model, called):
            self._hooks += [module.__dict__[name] for name in KINDS if not self._hears(path, [name])]
            if path in called:
                continue
            parted = (name.rpartition(".") for name in written)
            ours = {*OWN, "training", *(leaf for parent, _, leaf in parted if parent == path)}
            self._seen.append(_Seen(vars(module), dict(vars(module)), path, ours))
            paths = {name: f"{path}.{name}".removeprefix(".") for name in module._modules}
            idle = {name for name, where in paths.items() if used is not None and where not in used}
            self._seen.append(_Seen(module._modules, dict(module._modules), path, idle))
            for name in vars(module).keys() - ours:
                at = f"{path}.{name}".removeprefix(".")
                self._seen += [_Seen(live, live.copy(), where) for where, live in inside(vars(module)[name], at, known)]
        self._count, self._told = self._counted(), set(self.hooks(added_hooks))

    def changes(self) -> Changes:
        """Return what has changed since the last time; attributes that aren't as they were, each time."""
        paths: list[str] = []
        for seen in self._seen:
            try:
                if seen.live == seen.saved:
                    continue
            except Exception:  # arrays have no one answer
                pass
            paths += seen.changed()
        hooked = self._counted() != self._count
        if not paths and not hooked:
            return NOTHING
        self._count = self._counted()
        with_hooks = [path for path in self.hooks(added_hooks) if path not in self._told] if hooked else []
        self._told.update(with_hooks)
        return Changes(
            attributes=tuple(path for path in paths if path not in self.called and path not in self._joined),
            replaced=tuple(path for path in paths if path in self.called),
            joined=tuple(path for path in (*paths, *with_hooks) if path in self._joined),
            unheard=tuple(path for path in with_hooks if path not in self._joined),
            hooked=hooked,
        )

    def hooks(self, of: Callable[[nn.Module], dict[str, list[int]]] = user_hooks) -> list[str]:
        """Return the paths of the modules inside the model that have hooks and that the graph doesn't call.

        of: returns a module's hooks.
        """
        others = ((path, module) for path, module in _modules(self._model, self.called) if path not in self.called)
        return [path for path, module in others if path and (found := of(module)) and not self._hears(path, found)]

    def _hears(self, path: str, kinds: Collection[str]) -> bool:
        """Return whether hooks of these kinds on a module fire, though the graph has no call for it."""
        return path in self._tapped and set(kinds) <= {"_forward_hooks"}

    def _counted(self) -> int:
        return sum(map(len, self._hooks))


def _modules(model: nn.Module, called: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with each of its paths, but for what is inside of a called layer."""
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if isinstance(module, torch.jit.ScriptModule):
            continue  # what it is made of is no Python
        yield path, module
        if path not in called:
            children = module._modules.items()
            stack += [(f"{path}.{name}".removeprefix("."), child) for name, child in children if child is not None]
