"""A context in which a model may be changed, and after which it is as it was where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def put_back_on_error(model: nn.Module) -> Iterator[None]:
    """Put the attributes, parameters, buffers and modules of every module back where the context raises.

    What is changed in place (the numbers of a tensor, an object's own attributes) stays changed; lists and dicts are
    put back one level deep.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    held = [(live, live.copy()) for _, attributes in before for live in attributes.values() if _is_container(live)]
    try:
        yield
    except BaseException:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for live, copy in held:
            live.clear()
            live.extend(copy) if isinstance(live, list) else live.update(copy)
        raise


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | set)
