"""What is lost when tokens leave, guessed without data.

    F_t(m) = exp(-s t) (m / n)²        m tokens gone, n left, at a block before which the share t of the blocks lies

What is left counts: those gone have to be made up for by the n that are left, so the loss grows with how many there are to each, and
without bound. Where they leave counts by what is read in the end: where a head reads prefix tokens alone (CLS), late blocks
have gathered most of what a patch had to give, and s is 5; where it reads the patches (pooled, or returned), each is needed to
the last, and s is 2. The square, and the first s, are fits of the divergence measured block by block on small nets trained
on digits; published schedules of ImageNet nets with CLS agree, they spare the first blocks. The fit for pooled nets was 0.5,
which takes nearly all tokens at the first block: of a cluttered canvas that is right, of photographs nobody has measured it,
so 2 stands between that and an even rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gtp_fx.plan.damage.tables import Damage, Table
from gtp_fx.plan.site import Site

_DECAY_FOR_PREFIX, _DECAY_FOR_PATCHES = 5.0, 2.0
"""s: how much the logarithm of damage falls from the first block to the last."""

_UNCERTAINTY = 0.85
"""Of schedules at equal FLOPs on two trained nets, divergence lay a factor of 1.5 to 2.3 off what this prior expects (one standard deviation; a
geometric mean of 1.85), and the less above it the fewer sites there were (`bench/results/expected_damage.json`)."""


def prior_damage(sites: Sequence[Site]) -> Damage:
    return Damage(tuple(_table(site) for site in sites), "a prior without data", uncertainty=_UNCERTAINTY)


def _table(site: Site) -> Table:
    gone = np.arange(site.whole)
    decay = _DECAY_FOR_PATCHES if site.patches_read else _DECAY_FOR_PREFIX
    return np.asarray(np.exp(-decay * site.depth) * (gone / (site.whole - gone)) ** 2)
