"""What commands print, read without the line breaks that depend on the terminal's width."""

from __future__ import annotations


def in_one_line(text: str) -> str:
    """Return text with single spaces in place of line breaks and indents."""
    return " ".join(text.split())
