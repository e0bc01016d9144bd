"""A forward that does more than its output: what a later call reads is refused by name, what none reads is reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gtp_fx
from gtp_fx.capture.called_as import CalledAs
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module

from support.zoo import BY_NAME, build, images, in_tiers

ROW = BY_NAME["vit"]
INNER = build(ROW)


class Eventful(nn.Module):
    """A transformer whose forward also does `event`, which gets the module and the images."""

    def __init__(self, event: Callable[[Any, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.inner = INNER
        self.event = event
        self.calls = 0
        self.ready = False
        self.seen: list[Any] = []
        self.tables: dict[str, Tensor] = {}
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        changed = self.event(self, x)
        return self.inner(x if changed is None else changed)


def count(model: Any, x: Tensor) -> None:
    model.calls += 1


def log_every_tenth(model: Any, x: Tensor) -> None:
    model.calls += 1
    if model.calls % 10 == 0:
        print(f"call {model.calls}")


def keep(model: Any, x: Tensor) -> None:
    model.last = x.mean()


def keep_and_use(model: Any, x: Tensor) -> Tensor:
    """What is read is of the same call."""
    model.last = x * 2
    return model.last  # type: ignore[no-any-return]


def average(model: Any, x: Tensor) -> None:
    """Reads what it left, only to leave it again."""
    model.calls = 0.9 * model.calls + torch.add(x.mean(), model.calls, alpha=0.1)


def append(model: Any, x: Tensor) -> None:
    model.seen.append(x.sum())


def append_to_the_last_ten(model: Any, x: Tensor) -> None:
    model.seen = model.seen[-9:]
    model.seen.append(x.sum())


def remember(model: Any, x: Tensor) -> None:
    model.tables["mean"] = x.mean()


def add_up(model: Any, x: Tensor) -> None:
    model.total.add_(1)


UNREAD = {
    count: "calls",
    log_every_tenth: "calls",
    keep: "last",
    keep_and_use: "last",
    average: "calls",
    append: "seen",
    append_to_the_last_ten: "seen",
    remember: "tables",
    add_up: "total",
}


@torch.no_grad()
@pytest.mark.parametrize(
    "event",
    in_tiers(list(UNREAD), *(set(UNREAD) - {log_every_tenth, append, add_up})),
    ids=lambda event: event.__name__,
)
def test_what_forward_never_reads_is_not_kept_and_reported(event: Callable[..., Any]) -> None:
    model, x = Eventful(event).eval(), images(ROW)
    fast = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=x, compile=False)
    assert fast.report.not_kept == (UNREAD[event],)
    assert f"never reads it:\n  - {UNREAD[event]}" in str(fast.report)
    found = fast(x)
    assert (model.calls, model.seen, model.tables, float(model.total)) == (0, [], {}, 0), "as it was"
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def add_the_last(model: Any, x: Tensor) -> Tensor:
    before, model.last = getattr(model, "last", 0.0), x.mean()
    return x + before


def every_tenth_is_other(model: Any, x: Tensor) -> Tensor:
    model.calls += 1
    return -x if model.calls % 10 == 0 else x


def other_once_it_saw_some(model: Any, x: Tensor) -> Tensor:
    model.seen.append(0)
    return x * 2 if len(model.seen) > 5 else x


def write_what_it_left(model: Any, x: Tensor) -> Tensor:
    """An effect on a tensor of this call, which no result of an operator shows."""
    x = x.clone()
    x[:, :, 0] = model.calls
    model.calls += 1
    return x


def swallow(model: Any, x: Tensor) -> Tensor:
    model.calls += 1
    try:
        return x * (int(model.calls) > 10**6)
    except BaseException:
        return x * 0


def add_total(model: Any, x: Tensor) -> Tensor:
    model.total.add_(1)
    return x * model.total


def write_input(model: Any, x: Tensor) -> None:
    x.mul_(2)


READ = {
    add_the_last: "last",
    every_tenth_is_other: "calls",
    other_once_it_saw_some: "seen",
    write_what_it_left: "calls",
    swallow: "calls",
    add_total: "total",
    write_input: "x",
}


@pytest.mark.parametrize(
    "event", in_tiers(list(READ), add_the_last, other_once_it_saw_some, swallow), ids=lambda event: event.__name__
)
def test_what_a_later_call_or_the_caller_reads_is_refused_by_name(event: Callable[..., Any]) -> None:
    model = Eventful(event).eval()
    before = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    lists = (list(model.seen), dict(model.tables))
    with pytest.raises(gtp_fx.CaptureError, match=rf"Eventful changes {READ[event]} when it runs") as error:
        gtp_fx.optimize(model, flops_budget=0.7, example_inputs=images(ROW))
    assert "optimise the module inside" in str(error.value)
    after = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert (model.seen, model.tables) == lists
    assert model.total == 0
    assert not model._forward_hooks


def make_ready(model: Any, x: Tensor) -> None:
    model.ready = True


def cache(model: Any, x: Tensor) -> Tensor:
    if "scale" not in model.tables:
        model.tables["scale"] = model.inner.pos_embed.abs().mean()
    return x * model.tables["scale"]


def correct(model: Any, x: Tensor) -> None:
    """As a window that is larger than its image is made smaller."""
    model.calls = min(7, x.shape[-1])


@torch.no_grad()
@pytest.mark.parametrize(
    "event", in_tiers([make_ready, cache, correct], make_ready, cache), ids=lambda value: value.__name__
)
def test_what_is_done_once_is_no_side_effect(event: Callable[..., Any]) -> None:
    model, x = Eventful(event).eval(), images(ROW)
    fast = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=x, compile=False)
    assert (model.ready, model.tables, model.calls) == (False, {}, 0)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def decide(model: Any, x: Tensor) -> Tensor:
    return x * 2 if x.mean() > 0 else x


def test_a_course_that_depends_on_values_is_refused_with_what_to_do() -> None:
    model = Eventful(decide).eval()
    with pytest.raises(gtp_fx.CaptureError, match="decides by what a tensor holds") as error:
        gtp_fx.optimize(model, flops_budget=0.7, example_inputs=images(ROW))
    assert "Dynamo breaks the graph there" in str(error.value)
    assert isinstance(gtp_fx.optimize(model.inner, flops_budget=0.7, compile=False), nn.Module), "as it advises"


class CountsItsBatch(nn.Module):
    """len() is a number to Python's tracing; Dynamo keeps it open."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = INNER

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + torch.zeros(len(x), 1, 1, 1))


@pytest.mark.nightly
@torch.no_grad()
def test_len_of_a_batch_stays_open() -> None:
    model = CountsItsBatch().eval()
    fast = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=images(ROW), compile=False)
    x = images(ROW, 5)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class CountsItsCalls(CountsItsBatch):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_side_effects_are_seen_there_too() -> None:
    model = CountsItsCalls().eval()
    fast = gtp_fx.optimize(model, flops_budget=0.7, example_inputs=images(ROW), compile=False)
    assert fast.report.not_kept == ("calls",)
    assert model.calls == 0


class CountsInItsResult(nn.Module):
    """State that the next call reads, in a forward that takes flags as they come, and in a method beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = INNER, 0

    def forward(self, x: Tensor, **flags: Any) -> Tensor:
        self.calls += 1
        return self.calls * self.inner(x)

    def embed(self, x: Tensor) -> Tensor:
        return self.forward(x)


@pytest.mark.parametrize(
    "flags", [{}, {"twice": True}, {"scale": torch.ones(2, 1)}], ids=["none", "a flag", "a tensor"]
)
def test_state_is_seen_whatever_a_forward_is_called_with(flags: dict[str, Any]) -> None:
    model = CountsInItsResult().eval()
    with pytest.raises(gtp_fx.CaptureError, match="changes calls when it runs"):
        gtp_fx.optimize(model, flops_budget=0.7, example_inputs={"x": images(ROW), **flags}, compile=False)
    assert model.calls == 0


def test_state_of_another_method_is_seen() -> None:
    model = CountsInItsResult().eval()
    view = CalledAs(model, model.embed)
    with pytest.raises(gtp_fx.CaptureError, match="changes calls when it runs"):
        capture_module(view, call_signature(view, images(ROW)))
    assert model.calls == 0
