"""Hooks on tapped modules, which fire with the outputs that the graph returns of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from gtp_fx.capture.hooks import user_hooks
from gtp_fx.errors import InputError


class _NoInputs(tuple[Any, ...]):
    """What a hook gets as its module's inputs, which a tap doesn't have; reading them raises InputError."""

    __slots__ = ()

    def _refuse(self, *_: Any) -> NoReturn:
        raise InputError("a hook on a tapped module gets its output, and no inputs: tap the module that makes those")

    __getitem__ = __iter__ = __len__ = __bool__ = _refuse  # type: ignore[assignment]


def fire_hooks(model: nn.Module, tapped: Mapping[str, Any]) -> None:
    """Call the user's forward hooks on tapped modules, in the taps' order.

    tapped: outputs by the modules' paths.

    Raises InputError where a hook returns another output, which is too late.
    """
    for path, output in tapped.items():
        module = model.get_submodule(path)
        for key in user_hooks(module).get("_forward_hooks", ()):
            hook: Any = module._forward_hooks[key]
            kwargs: tuple[Any, ...] = ({},) if key in module._forward_hooks_with_kwargs else ()
            if hook(module, _NoInputs(), *kwargs, output) is not None:
                raise InputError(
                    f"a forward hook on {path!r} returns another output, and the optimised graph, which has no call "
                    f"for that module, can't take it: a hook on a layer (a linear layer, a norm) may return one, one "
                    f"on a tapped module may only read"
                )
