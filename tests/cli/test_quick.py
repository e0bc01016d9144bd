"""What answers at once, because nothing heavy is imported for it; and that what is imported later is all there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import timm

from gtp_fx.cli import completion
from gtp_fx.graph.torch_internals import inductor_modes
from gtp_fx.strategies.registry import STRATEGIES, is_own

from support.checkout import ROOT

SECONDS = 0.5
"""Of processor time, the interpreter's own start included; some 0.2 are usual."""
HEAVY = {"torch", "timm", "transformers", "numpy", "PIL", "matplotlib"}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environment}
    return subprocess.run((sys.executable, "-c", code), env=whole, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["--help"], {}, "optimize"),
        (["optimize", "--help"], {}, "--flops-budget"),
        (["export", "--help"], {}, "--save-schedule"),
        (["--version"], {}, "gtp-fx "),
        (["optimise"], {}, "No such command 'optimise'"),
        (["plan", "x", "--flop-budget", "1"], {}, "No such option: --flop-budget"),
        ([], {"COMP_WORDS": "gtp-fx pl", "COMP_CWORD": "1"}, "plan"),
        ([], {"COMP_WORDS": "gtp-fx plan deit_small_patch16_2", "COMP_CWORD": "2"}, "deit_small_patch16_224"),
        ([], {"COMP_WORDS": "gtp-fx optimize x --strategy to", "COMP_CWORD": "4"}, "tome"),
        ([], {"COMP_WORDS": "gtp-fx plan x --target rtx", "COMP_CWORD": "4"}, "rtx4090"),
    ],
)
def test_what_needs_no_model_takes_no_time(arguments: list[str], environment: dict[str, str], told: str) -> None:
    """The best of three, since other processes may be running."""
    code = (
        f"import atexit, sys, time\n"
        f"heavy = lambda: sorted(sys.modules.keys() & {HEAVY})\n"
        f"atexit.register(lambda: print('\\nend', heavy(), time.process_time()))\n"
        f"from gtp_fx.cli.app import main\n"
        f"main({arguments}, prog_name='gtp-fx')"
    )
    completing = {"_GTP_FX_COMPLETE": "complete_bash"} if environment else {}
    taken = []
    for _ in range(3):
        done = python(code, **completing, **environment)
        _, _, end = done.stdout.rpartition("\nend ")
        heavy, _, seconds = end.rpartition(" ")
        assert heavy == "[]" and told in done.stdout + done.stderr, done
        taken.append(float(seconds))
        if taken[-1] < SECONDS:
            return
    pytest.fail(f"{taken} processor seconds")


def test_no_line_of_the_commands_is_cut_at_80_columns() -> None:
    told = python("from gtp_fx.cli.app import main; main(['--help'], prog_name='gtp-fx')").stdout
    _, _, commands = told.partition("Commands:\n")
    assert commands.split()[0] == "optimize"  # README's first
    assert "..." not in commands and max(map(len, told.splitlines())) <= 80


def test_names_that_a_shell_completes_are_those_there_are() -> None:
    assert set(completion.STRATEGIES) == {"auto"} | {name for name, cls in STRATEGIES.items() if is_own(cls)}
    assert set(completion.MODES) == set(inductor_modes())
    assert set(timm.list_models()) <= set(completion.timm_names())


AFTERWARDS = """
import gtp_fx, sys
assert 'torch' not in sys.modules and {'optimize', 'GTP'} <= set(dir(gtp_fx))
import importlib.util
assert importlib.util.find_spec('torch')  # looked for, as libraries do, and not imported
import torch
torch.ops.gtp_fx.recover.default
gtp_fx.strategies.Regeneration, gtp_fx.model.optimize.optimize
assert gtp_fx.optimize is gtp_fx.model.optimize.optimize
try:
    gtp_fx.optimise
except AttributeError as error:
    print(error)
"""


def test_what_is_imported_later_is_there_when_it_is_needed() -> None:
    done = python(AFTERWARDS)
    assert done.stdout == "module 'gtp_fx' has no attribute 'optimise'\n", done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("module", ["gtp_fx.plan.cost.formulas", "gtp_fx.types.rules.registry", "gtp_fx.strategies"])
def test_a_module_may_be_imported_first(module: str) -> None:
    done = python(f"import {module}, gtp_fx; gtp_fx.optimize")
    assert done.returncode == 0, done.stderr
