"""All the schedules that there are in coarse steps, and what each does: for brute force."""

from __future__ import annotations

import itertools

import numpy as np

from gtp_fx.plan.cost.chains import Chain, CostModel
from gtp_fx.plan.damage.tables import Damage


def coarse(chain: Chain) -> np.ndarray:
    """Every count in eight steps."""
    step = max(1, chain.whole // 7)
    levels = np.arange(chain.whole, 0, -step)
    return levels if levels[-1] == 1 else np.append(levels, 1)


def every_schedule(model: CostModel) -> list[tuple[int, ...]]:
    per_chain = []
    for own in model.chains:
        paths = itertools.combinations_with_replacement(coarse(own).tolist(), len(own.places))
        per_chain.append([[a - b for a, b in itertools.pairwise((own.whole, *path))] for path in paths])
    schedules = []
    for chosen in itertools.product(*per_chain):
        counts = [0] * len(model.sites)
        for own, part in zip(model.chains, chosen, strict=True):
            for place, count in zip(own.places, part, strict=True):
                counts[place] = count
        schedules.append(tuple(counts))
    return schedules


def damage_of(model: CostModel, damage: Damage, counts: tuple[int, ...]) -> float:
    total = 0.0
    for own in model.chains:
        before = own.whole
        for place in own.places:
            after = before - counts[place]
            total += float(damage.step(place, own.whole, before, after))
            before = after
    return total
