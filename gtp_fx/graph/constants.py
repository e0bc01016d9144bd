"""Constants that a pass adds to a graph: tables of numbers that sizes alone decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from gtp_fx.graph.edit import META_KEYS, constant_names


@dataclass
class Constants:
    """Those that one pass adds; equal ones are held once.

    gm: the graph module that holds them, as buffers that no state dict has.
    """

    gm: fx.GraphModule
    _names: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def read(self, table: np.ndarray, like: fx.Node) -> fx.Node:
        """Insert a read of a table of integers at the graph's insertion point.

        like: the node whose device and origin it gets.
        """
        known: torch.Tensor = like.meta["val"]
        node = self.gm.graph.get_attr(self._held(table, known.device))
        node.meta = {key: like.meta[key] for key in META_KEYS if key in like.meta}
        node.meta["val"] = known.new_empty(table.shape, dtype=torch.int64)
        return node

    def _held(self, table: np.ndarray, device: torch.device) -> str:
        """Return the name under which a table is held from now on."""
        key = (device, table.shape, table.astype(np.int64).tobytes())
        if key not in self._names:
            # On "meta" it would lose its numbers; the model may get weights, and a device, later.
            device = torch.device("cpu") if device.type == "meta" else device
            # What is made in inference mode couldn't be saved for a backward pass later.
            with torch.inference_mode(False):
                value = torch.tensor(table, dtype=torch.int64, device=device)
            self._names[key] = name = next(constant_names(lambda name: hasattr(self.gm, name)))
            self.gm.register_buffer(name, value, persistent=False)
        return self._names[key]
