"""The model card in a saved model's folder, README.md: the section that an evaluation has for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

FILE = "README.md"
_BEGIN, _END = "<!-- gtp_fx: evaluation -->", "<!-- gtp_fx: end of evaluation -->"
"""Stand around the section, so that another save replaces it and nothing else."""


class Evaluated(Protocol):
    """An evaluation, as `gtp_fx.evaluate` returns it."""

    def model_card(self, fast: Any) -> str:
        """Return the section for an optimised model, in Markdown. Raises OptionError where it isn't one of its."""


def with_section(text: str, section: str) -> str:
    """Return a model card's text with a section, in the place of an earlier one or at the end."""
    whole = f"{_BEGIN}\n{section.strip()}\n{_END}\n"
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        return before + whole + after.removeprefix("\n")
    return f"{text.rstrip()}\n\n{whole}" if text.strip() else whole


def write_card(section: str, draft: Path, folder: Path) -> None:
    """Write the card to a draft: the one that is there already, or in the folder that the draft is for, with a section.

    Raises OSError.
    """
    there = next((file for file in (draft / FILE, folder / FILE) if file.exists()), None)
    (draft / FILE).write_text(with_section("" if there is None else there.read_text(), section))
