"""What has to be decided before anything imports torch or Triton, and the processor time that each case takes."""

from __future__ import annotations

import gc
import importlib
import logging
import os
from collections.abc import Generator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes side by side: threads of theirs would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # kernels are Triton's interpreter's then
    os.environ["TRITON_INTERPRET"] = "1"

# Torch's and transformers' own objects and the captured models live until the end; looking through them again and again
# for garbage took a twentieth of the time of those that optimise.
gc.set_threshold(200_000, 20, 100)

# Where pytest's cache keeps what the cases of each tier took, in processor seconds.
DEFAULT = "gtp_fx/processor_seconds"
NIGHTLY = "gtp_fx/processor_seconds_nightly"
STARTED = pytest.StashKey[float]()


def processor_seconds() -> float:
    """Time of this process and of those that it has waited for; other programs on the machine don't count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[STARTED] = processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Keep pytest's log handlers off torch's structured trace: where it has one, torch writes every graph as text."""
    trace = logging.getLogger("torch.__trace")
    handlers, trace.handlers = trace.handlers, []
    try:
        return (yield)
    finally:
        trace.handlers = handlers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "teardown":
        tier = DEFAULT if item.get_closest_marker("nightly") is None else NIGHTLY
        report.user_properties.append((tier, processor_seconds() - item.stash[STARTED]))
    return report


@pytest.fixture(autouse=True)
def gradients_are_left_on() -> Generator[None, None, None]:
    """Fail a case that leaves gradients off, by which some later one would fail."""
    yield
    left_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left_on, "it leaves gradients off"


@pytest.fixture
def fresh_dynamo() -> Generator[None, None, None]:
    """Let Dynamo know nothing of what other cases compiled, nor others of this one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let autograd's graphs run as they are, instead of being Inductor's: no C++ is compiled, which takes minutes."""
    from torch._dynamo.backends.debugging import aot_eager

    compile_fx = importlib.import_module("torch._inductor.compile_fx")
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **_: aot_eager(gm, list(inputs)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported stays


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that the others report to
        config.pluginmanager.register(Recorder(config))


class Recorder:
    """Leaves in pytest's cache what each case took: `test_durations` reads the default tier, people the other."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.taken: dict[str, dict[str, float]] = {DEFAULT: {}, NIGHTLY: {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name in self.taken and isinstance(value, float):
                self.taken[name][report.nodeid] = round(value, 2)

    def pytest_sessionfinish(self) -> None:
        cache = getattr(self.config, "cache", None)
        if cache is not None:
            for tier, taken in self.taken.items():
                if taken:
                    cache.set(tier, taken)
