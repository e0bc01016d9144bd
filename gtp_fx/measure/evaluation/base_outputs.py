"""The original's outputs on a set of images, kept on disk, so that it runs once on each image.

They are arrays over the whole set, into which rows are written as they are found. A second array says which rows those
are. Processes that share the images may share the arrays. The sets that were used longest ago are removed where all of
them together take more than 16 GiB.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gtp_fx.errors import warn
from gtp_fx.targets.cache import cache_folder

_MOST_BYTES = 4 * 2**30
"""Of one set. More than 50,000 images of 1,000 classes take; maps of features of a large set aren't kept."""
_MOST_OF_ALL = 16 * 2**30
"""Of all sets."""
_KNOWN = "known.npy"
"""The array of the rows that are known; a set was used when it was last touched."""


@dataclass
class BaseOutputs:
    """The original's outputs by image.

    folder: where they are kept; None to keep none.
    images: images in the set.
    ran: images on which the original has run since this was made.
    """

    folder: Path | None
    images: int
    ran: int = 0
    _arrays: list[Any] = field(default_factory=list)
    _known: Any = None

    def at(self, places: Sequence[int], run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return the outputs on a batch of images: kept ones, or those of `run`, which are kept then.

        places: numbers of the images in the set.
        """
        if self._known is None and self.folder is not None:
            self._open()
        if self._arrays and self._known[list(places)].all():
            return [torch.from_numpy(np.array(array[list(places)])) for array in self._arrays]
        outputs = run()
        self.ran += len(places)
        if self.folder is not None:
            try:
                self._keep(self.folder, places, outputs)
            except OSError as error:
                warn(
                    f"the original's outputs can't be kept in {self.folder} ({error.strerror or error}), so the next "
                    f"run computes them again; the environment variable GTP_FX_CACHE names another folder",
                )
                self.folder, self._arrays = None, []
        return outputs

    def _open(self) -> None:
        """Open what an earlier run has left."""
        assert self.folder is not None
        files = sorted(self.folder.glob("output*.npy"))
        known = self.folder / _KNOWN
        try:
            if files and known.exists():
                os.utime(known)
                arrays = [np.load(file, mmap_mode="r+") for file in files]
                self._known, self._arrays = np.load(known, mmap_mode="r+"), arrays
        except FileNotFoundError:  # another process has removed the set meanwhile
            pass

    def _keep(self, folder: Path, places: Sequence[int], outputs: Sequence[Tensor]) -> None:
        """Write rows; the arrays are made at the first ones."""
        if not self._arrays:
            shapes = [(self.images, *t.shape[1:]) for t in outputs]
            if sum(4 * int(np.prod(shape)) for shape in shapes) > _MOST_BYTES:
                self.folder = None
                return
            folder.mkdir(parents=True, exist_ok=True)
            remove_oldest(folder.parent, _MOST_OF_ALL - _MOST_BYTES, but=folder)
            self._arrays = [_array(folder / f"output{i}.npy", shape) for i, shape in enumerate(shapes)]
            self._known = _array(folder / _KNOWN, (self.images,), np.bool_)
        for array, output in zip(self._arrays, outputs, strict=True):
            array[list(places)] = output.numpy()
            array.flush()
        self._known[list(places)] = True
        self._known.flush()


def remove_oldest(folder: Path, most: int, but: Path) -> None:
    """Remove the sets in a folder that were used longest ago, until all take no more than `most` bytes.

    but: a set that stays. One that another process has open stays open to that, and is made anew by the next.
    """
    sets = []
    for each in folder.iterdir():
        try:
            known = each / _KNOWN
            used = (known if known.exists() else each).stat().st_mtime
            sets.append((used, each, sum(file.stat().st_size for file in each.iterdir())))
        except OSError:  # another process is removing it, or it is no set
            continue
    total = sum(size for *_, size in sets)
    for _, oldest, size in sorted(sets):
        if total <= most:
            return
        if oldest != but:
            shutil.rmtree(oldest, ignore_errors=True)
            total -= size


def folder_for(graph: str, run: Mapping[str, object]) -> Path:
    """Return where the outputs of an original are kept. graph: its code. run: what else decides them, by name."""
    digest = hashlib.sha256((graph + str(sorted(run.items()))).encode()).hexdigest()[:32]
    return cache_folder() / "base_outputs" / digest


def _array(file: Path, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """Open an array of zeros in a file, which is made where there is none."""
    draft = file.with_suffix(f".{os.getpid()}")
    np.lib.format.open_memmap(draft, mode="w+", dtype=dtype, shape=shape).flush()
    try:
        os.link(draft, file)  # unlike a rename, never replaces what another process has made meanwhile
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return np.load(file, mmap_mode="r+")
