"""What the compiler knows of a processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """name: as users give it. device: torch's device type. inductor: options for Inductor, measured to pay there."""

    name: str
    device: str
    inductor: Mapping[str, Any] = field(default_factory=dict)
