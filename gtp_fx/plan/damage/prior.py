"""Expected damage without data.

    F_t(m) = exp(-s t) (m / n)²

m is the number of tokens removed and n the number that remain, at a block with the share t of the blocks before it.

The ratio m / n: the n remaining tokens have to make up for those removed. So damage grows with how many removed tokens
each of them stands for, and without bound.

Where m of W windows rest, each goes on by its own cells and needs no other, so damage has a bound: (2 m / W)³ in place
of the square. It is as much as that of tokens where half rest. On nets in windows trained on photographs it grew with
a power of m / W of 1 to 2, on digits of 2 to 6.

The decay s depends on what is read at the end. Where a head reads prefix tokens alone (CLS), late blocks have already
gathered most of what a patch contributes, and s is 5. Where it reads the patches (pooled, or returned), each patch is
needed to the end, and s is 2.

The square, and s = 5, are fits of the divergence measured block by block on small nets trained on digits. Published
schedules of ImageNet nets with CLS agree: they spare the first blocks. For pooled nets the fit was s = 0.5, which
removes nearly all tokens at the first block. That is right for a cluttered canvas; nobody has measured it for
photographs, so s = 2 is a compromise between that and an even rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gtp_fx.plan.damage.tables import Damage, Table
from gtp_fx.plan.site import RestCost, Site

_DECAY_FOR_PREFIX, _DECAY_FOR_PATCHES = 5.0, 2.0
"""The decay s: how much the logarithm of damage falls from the first block to the last."""

_UNCERTAINTY = 0.85
"""How far this prior is off, as `Damage.uncertainty`.

On schedules of equal FLOPs of two trained nets, the measured divergence was a factor of 1.5 to 2.3 (one standard
deviation; geometric mean 1.85) off what this prior expects. The fewer sites a schedule had, the less it was above it
(`bench/results/expected_damage.json`)."""


def prior_damage(sites: Sequence[Site]) -> Damage:
    """Return the prior's damage table for each site."""
    return Damage(tuple(_table(site) for site in sites), "a prior without data", uncertainty=_UNCERTAINTY)


def _table(site: Site) -> Table:
    """Return [whole] the damage by the number of tokens removed."""
    removed = np.arange(site.whole)
    decay = _DECAY_FOR_PATCHES if site.patches_read else _DECAY_FOR_PREFIX
    if isinstance(site.branch, RestCost):
        each = (2 * removed / site.whole) ** 3
    else:
        each = (removed / (site.whole - removed)) ** 2
    return np.asarray(np.exp(-decay * site.depth) * each)
