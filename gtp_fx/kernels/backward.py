"""Gradients of kernels: backward computes a reference in plain ATen again and differentiates it.

Only the inputs are saved for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(operator: Any, reference: Callable[..., Any]) -> None:
    """Give `operator`, one of `torch.library`'s, the gradients of `reference`.

    reference: takes the operator's arguments and returns a tuple of its first outputs. Outputs after those have no
        gradient.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[place] for place in ctx.places))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = list(ctx.others)
        wanted = [place for place in ctx.places if ctx.needs_input_grad[place]]
        with torch.enable_grad():
            for place, value in zip(ctx.places, ctx.saved_tensors, strict=True):
                arguments[place] = value.detach().requires_grad_(place in wanted)
            outputs = reference(*arguments)
        # Outputs that nothing reads have no gradient, and those made from no tensor with one can't be differentiated.
        pairs = [
            (out, grad) for out, grad in zip(outputs, grads, strict=False) if grad is not None and out.requires_grad
        ]
        found: list[Tensor | None] = [None] * len(arguments)
        if pairs and wanted:
            again, arrived = zip(*pairs, strict=True)
            inputs = [arguments[place] for place in wanted]
            made = torch.autograd.grad(again, inputs, arrived, allow_unused=True)
            for place, gradient in zip(wanted, made, strict=True):
                found[place] = gradient
        return tuple(found)

    operator.register_autograd(backward, setup_context=keep)


def not_differentiable(operator: Any) -> None:
    """Mark the outputs of `operator` as not differentiable, so that autograd computes no gradients for them."""

    def mark(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise AssertionError("its outputs are marked as not differentiable")

    operator.register_autograd(backward, setup_context=mark)
