"""Threads that run a model wait for the one that traces it, and nobody waits for who waits for him."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gtp_fx.capture import turns
from gtp_fx.graph.torch_internals import is_traced

LONG, SHORT = 10.0, 0.2


def in_thread(work: Callable[[], None]) -> tuple[threading.Thread, threading.Event]:
    done = threading.Event()
    thread = threading.Thread(target=lambda: (work(), done.set()), daemon=True)
    thread.start()
    return thread, done


def enter(context: Callable[[], object]) -> None:
    with context():  # type: ignore[attr-defined]
        pass


@pytest.mark.parametrize("part", [lambda net: net, lambda net: net[0]])
def test_a_run_waits_for_the_tracing_of_the_model_or_of_a_part(part: Callable[[nn.Module], nn.Module]) -> None:
    net, other = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    with turns.tracing(part(net)):
        enter(lambda: turns.running(turns.modules_of(net)))  # what traces may run
        _, run = in_thread(lambda: enter(lambda: turns.running(turns.modules_of(net))))
        _, elsewhere = in_thread(lambda: enter(lambda: turns.running(turns.modules_of(other))))
        assert elsewhere.wait(LONG)
        assert not run.wait(SHORT)
    assert run.wait(LONG)


def test_tracing_waits_for_runs_and_a_run_within_one_does_not_wait_for_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    modules = turns.modules_of(net)
    with turns.running(modules):
        _, traced = in_thread(lambda: enter(lambda: turns.tracing(net)))
        assert not traced.wait(SHORT)
        enter(lambda: turns.running(modules))
    assert traced.wait(LONG)


def test_a_run_under_a_lock_that_tracing_wants_ends() -> None:
    """As Inductor does, which compiles under the lock that a tracing takes."""
    net, lock = nn.Linear(2, 2), threading.Lock()

    def trace() -> None:
        with turns.tracing(net), lock:
            net(torch.zeros(1, 2))

    with turns.running(turns.modules_of(net)):
        _, traced = in_thread(trace)
        assert not traced.wait(SHORT)
        with lock:
            pass
    assert traced.wait(LONG)


def test_a_thread_isnt_traced_because_another_one_exports() -> None:
    asked, inside, answers = threading.Event(), threading.Event(), []

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answers.append(is_traced())
            inside.set()
            asked.wait(LONG)
            return x + 1

    _, done = in_thread(lambda: torch.export.export(Slow(), (torch.ones(2),)))
    assert inside.wait(LONG)
    here, flag = is_traced(), torch.compiler.is_compiling()
    asked.set()
    assert done.wait(LONG)
    assert flag, "torch says so in every thread, or this test says nothing"
    assert not here
    assert answers[0]
    assert not is_traced()
