"""What a shell completes on TAB. Nothing heavy is imported: names come from sources and small tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

STRATEGIES = (
    "auto",
    "gtp",
    "cluster",
    "halting",
    "idle",
    "mergence",
    "ppt",
    "random",
    "regeneration",
    "saliency",
    "semantic",
    "tome",
    "topk",
)
"""Names that a strategy may have: "auto" and those in `gtp_fx.strategies.STRATEGIES`, which imports torch."""
MODES = ("default", "lite", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
"""torch.compile's modes, as torch lists them."""
_FEWEST = 3
"""Letters before models are completed, since there are many."""
_REGISTERED = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)


def models(incomplete: str) -> list[str]:
    """Return timm's names that complete what was typed; none before three letters, or without timm."""
    return _completing(timm_names(), incomplete) if len(incomplete) >= _FEWEST else []


def timm_names() -> list[str]:
    """Return timm's model names, read from its sources, since importing it takes seconds."""
    found = find_spec("timm")
    folders = [] if found is None else found.submodule_search_locations or []
    files = (file for folder in folders for file in Path(folder, "models").glob("*.py"))
    return sorted(name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8")))


def strategies(incomplete: str) -> list[str]:
    return _completing(STRATEGIES, incomplete)


def targets(incomplete: str) -> list[str]:
    from gtp_fx.targets import TARGETS

    return _completing(("auto", *TARGETS), incomplete)


def schedules(incomplete: str) -> list[str]:
    from gtp_fx.options.schedule import SCHEDULES

    return _completing(SCHEDULES, incomplete)


def outputs(incomplete: str) -> list[str]:
    from gtp_fx.options.values import OUTPUTS

    return _completing(OUTPUTS, incomplete)


def modes(incomplete: str) -> list[str]:
    return _completing(MODES, incomplete)


def _completing(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
