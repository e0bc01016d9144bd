"""Every strategy but GTP by hand on a timm VisionTransformer, image by image and token by token, in float64.

Written from the publications, sharing nothing with the product: a site is a Python loop over tokens. A `Choice` says
which tokens stay and what each becomes. Letters as in `reference`; a tensor of one image has no B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from support.reference_recovery import Left, everyone_back


@dataclass
class Seen:
    """What a strategy may look at, of one image: n patches in the order of the grid, behind `prefix` other tokens."""

    x_nC: Tensor
    map_HNN: Tensor
    k_HnD: Tensor
    v_HnD: Tensor
    sizes: list[float]
    places: list[tuple[int, int]]
    prefix: int
    removed: int
    memory: list[float] | None

    @property
    def cls(self) -> list[float]:
        """Attention that the first token pays each patch, mean over heads."""
        return self.map_HNN[:, 0, self.prefix :].mean(0).tolist()

    @property
    def received(self) -> list[float]:
        """What all tokens pay each patch on average, mean over heads."""
        return self.map_HNN[:, :, self.prefix :].mean(dim=(0, 1)).tolist()


@dataclass
class Choice:
    """made_of: for each token that stays, in the order of the grid, its place among the n and what it is made of.
    sizes: of those. memory: a number for each of the n, for the next site."""

    made_of: list[tuple[int, dict[int, float]]]
    sizes: list[float] | None = None
    memory: list[float] | None = None


Chooser = Callable[[Seen], Choice]


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """Of equal ones the last ones first."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], -i))
    return sorted(order[:count])


def drop(seen: Seen, scores: Sequence[float], memory: list[float] | None = None) -> Choice:
    gone = set(lowest(scores, seen.removed))
    return Choice([(i, {i: 1.0}) for i in range(len(scores)) if i not in gone], memory=memory)


def mean_of(seen: Seen, members: dict[int, list[int]]) -> Choice:
    """members: by the token that stays, who joins it. Means in which each counts for the patches it stands for."""
    made_of, sizes = [], []
    for keeper in sorted(members):
        group = [keeper, *members[keeper]]
        total = sum(seen.sizes[i] for i in group)
        made_of.append((keeper, {i: seen.sizes[i] / total for i in group}))
        sizes.append(total)
    return Choice(made_of, sizes)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def matched(seen: Seen, listed: list[int] | None = None) -> tuple[dict[int, list[int]], list[int]]:
    """ToMe, section 3.2: A and B alternate over all tokens (prefix tokens included), the r strongest edges from A to B.

    Rounds where r is more than A holds, each on the means of the one before. Also returns those that stay as the
    authors' code lists them: what is left of A (by similarity where there is no prefix token), then B.
    """
    listed = list(range(len(seen.sizes))) if listed is None else listed
    groups = {i: [i] for i in listed}
    metric = seen.k_HnD.mean(0)
    left = seen.removed
    while left:
        features = {
            keeper: sum(seen.sizes[i] * metric[i] for i in group) / sum(seen.sizes[i] for i in group)  # type: ignore[operator]
            for keeper, group in groups.items()
        }
        side_a = [keeper for at, keeper in enumerate(listed) if (seen.prefix + at) % 2 == 0]
        side_b = [keeper for at, keeper in enumerate(listed) if (seen.prefix + at) % 2 == 1]
        edges = []
        for a in side_a:
            likeness = [cosine(features[a], features[b]) for b in side_b]
            best = max(range(len(side_b)), key=lambda j: likeness[j])
            edges.append((likeness[best], a, side_b[best]))
        edges.sort(reverse=True)
        count = min(left, len(side_a))
        for _, a, b in edges[:count]:
            groups[b] = groups[b] + groups.pop(a)
        stay = [a for _, a, _ in edges[count:]]
        if seen.prefix:
            stay = [a for a in side_a if a in stay]
        listed = stay + side_b
        left -= count
    return {group[0]: group[1:] for group in groups.values()}, listed


def tome(seen: Seen) -> Choice:
    before = seen.memory
    listed = None if before is None else sorted(range(len(before)), key=lambda i: before[i])
    members, now = matched(seen, listed)
    choice = mean_of(seen, members)
    choice.memory = [float(now.index(i)) if i in now else -1.0 for i in range(len(seen.sizes))]
    return choice


def topk(seen: Seen, scores: Callable[[Seen], list[float]] = lambda s: s.cls, normalised: bool = False) -> Choice:
    """EViT, section 3.3: the inattentive tokens as one, sum of a_i x_i, in the place of the most attentive of them."""
    a = scores(seen)
    inattentive = lowest(a, seen.removed + 1)
    carrier = max(inattentive, key=lambda i: (a[i], -i))
    whole = sum(a[i] for i in inattentive) if normalised else 1.0
    fused = {i: a[i] / whole for i in inattentive}
    made_of = [(i, {i: 1.0}) for i in range(len(a)) if i not in inattentive]
    return Choice(sorted([*made_of, (carrier, fused)], key=lambda made: made[0]))


def ppt(seen: Seen, threshold: float) -> Choice:
    """PPT, section 3: pruned where the scores' variance is the threshold or more, else pooled."""
    lengths = [float(seen.v_HnD[:, i].norm()) for i in range(len(seen.sizes))]
    raw = [a * length for a, length in zip(seen.cls, lengths, strict=True)]
    scores = [value / sum(raw) for value in raw]
    mean = sum(scores) / len(scores)
    variance = sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)
    if variance < threshold:
        return mean_of(seen, matched(seen)[0])
    choice = drop(seen, scores)
    return Choice(choice.made_of, [seen.sizes[i] for i, _ in choice.made_of])


def mergence(seen: Seen) -> Choice:
    others = lowest(seen.cls, seen.removed)
    crucial = [i for i in range(len(seen.sizes)) if i not in others]
    members: dict[int, list[int]] = {i: [] for i in crucial}
    for j in others:
        members[max(crucial, key=lambda i: cosine(seen.x_nC[i], seen.x_nC[j]))].append(j)
    return mean_of(seen, members)


def regeneration(seen: Seen, difficulty: float = 1.0) -> Choice:
    """What a token receives, times how far the nearest that receives more is: lost if that one stands in for it."""
    n, keys_nD, received = len(seen.sizes), seen.k_HnD.mean(0), seen.received
    unit_nD = keys_nD / keys_nD.norm(dim=1, keepdim=True)
    alike = (unit_nD @ unit_nD.T).tolist()
    scores = []
    for i in range(n):
        nearest = max((alike[i][j] for j in range(n) if received[j] > received[i]), default=-1.0)
        scores.append(received[i] * (1 - nearest) ** difficulty)
    others = lowest(scores, seen.removed)
    members: dict[int, list[int]] = {i: [] for i in range(n) if i not in others}
    for j in others:
        members[max(members, key=lambda i: alike[i][j])].append(j)
    return mean_of(seen, members)


def cluster(seen: Seen, neighbors: int = 5, spatial: float = 1.0, sides: tuple[int, int] = (0, 0)) -> Choice:
    """AiluRus: density peaks, with a distance that knows places."""
    n = len(seen.sizes)
    features = [[float((seen.x_nC[i] - seen.x_nC[j]).norm()) for j in range(n)] for i in range(n)]
    mean = sum(map(sum, features)) / n**2
    diagonal = math.hypot(*sides)
    apart = [
        [features[i][j] / mean + spatial * math.dist(seen.places[i], seen.places[j]) / diagonal for j in range(n)]
        for i in range(n)
    ]
    density = []
    for i in range(n):
        near = sorted(apart[i][j] for j in range(n) if j != i)[:neighbors]
        density.append(math.exp(-sum(d * d for d in near) / len(near)))
    peaks = []
    for i in range(n):
        denser = [apart[i][j] for j in range(n) if density[j] > density[i]]
        peaks.append(density[i] * (min(denser) if denser else max(apart[i])))
    others = lowest(peaks, seen.removed)
    anchors = [i for i in range(n) if i not in others]
    members: dict[int, list[int]] = {i: [] for i in anchors}
    for j in others:
        members[min(anchors, key=lambda i: apart[j][i])].append(j)
    return mean_of(seen, members)


def halting(seen: Seen, gamma: float = 5.0, beta: float = -10.0) -> Choice:
    """A-ViT, section 3.1, added up; those nearest to halting leave."""
    before = seen.memory or [0.0] * len(seen.sizes)
    sums = [s + 1 / (1 + math.exp(-(gamma * float(x[0]) + beta))) for s, x in zip(before, seen.x_nC, strict=True)]
    return drop(seen, [-s for s in sums], memory=sums)


def saliency(seen: Seen, heat: Callable[[], list[float]], fused: int) -> Choice:
    """CageViT: major tokens stay, minor ones become `fused`, neighbours in the order of their heat together."""
    scores = heat()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    staying = len(scores) - seen.removed
    minor = order[staying:]
    fused = min(fused, staying, len(minor))
    carriers = order[staying - fused : staying]
    members: dict[int, list[int]] = {i: [] for i in order[:staying]}
    for rank, i in enumerate(minor):
        members[carriers[rank * fused // len(minor)]].append(i)
    return mean_of(seen, members)


def semantic(seen: Seen, sides: tuple[int, int]) -> Choice:
    """STViT: the mean of each cell, in the place of the token nearest to its middle."""
    pending = [((0, 0), sides, len(seen.x_nC) - seen.removed)]
    members: dict[int, list[int]] = {}
    while pending:
        (top, left), (height, width), count = pending.pop()
        if count > 1:  # halve the longer side; each half gets its share, rounded
            rows = height >= width
            half = (height if rows else width) // 2
            first = int(count * half / (height if rows else width) + 0.5)
            if rows:
                pending.append(((top, left), (half, width), first))
                pending.append(((top + half, left), (height - half, width), count - first))
            else:
                pending.append(((top, left), (height, half), first))
                pending.append(((top, left + half), (height, width - half), count - first))
            continue
        inside = [i for i, (r, c) in enumerate(seen.places) if top <= r < top + height and left <= c < left + width]
        middle = (top + (height - 1) / 2, left + (width - 1) / 2)
        keeper = min(inside, key=lambda i: (math.dist(seen.places[i], middle), i))
        members[keeper] = [i for i in inside if i != keeper]
    return mean_of(seen, members)


@dataclass
class Told:
    """How the walk uses a chooser: whether attention gets sizes, where it chooses, whether what is left there attends
    to all that was, whether tokens are restored. attends: everyone is back before the last norm, as in
    `reference_recovery`; nobody where None."""

    choose: Chooser
    told: bool = False
    before: bool = False
    to_all: bool = False
    idles: Callable[[Seen], list[float]] | None = None
    attends: bool | None = None
    stream: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def strategy_reference(model: VisionTransformer, images_BCHW: Tensor, schedule: Sequence[int], how: Told) -> Tensor:
    """Logits of `model`, whose blocks lose `schedule` patches each, in float64."""
    double = model.double()
    try:
        rows = [_one_image(double, image[None].double(), schedule, how) for image in images_BCHW]
    finally:
        model.float()
    return torch.cat(rows)


def _one_image(model: VisionTransformer, image: Tensor, schedule: Sequence[int], how: Told) -> Tensor:
    x_NC = model.norm_pre(model._pos_embed(model.patch_embed(image)))[0]
    prefix, (rows, columns) = model.num_prefix_tokens, model.patch_embed.grid_size
    places = [(r, c) for r in range(rows) for c in range(columns)]
    sizes, memory = [1.0] * len(places), None
    sites: list[Left] = []
    waiting_GC, waiting_scores, chosen = None, [0.0] * len(places), list(range(len(places)))
    for block, removed in zip(model.blocks, schedule, strict=True):
        of_keys_NC, of_keys = x_NC, sizes
        if how.before and removed:
            nothing = torch.zeros(0)
            seen = Seen(x_NC[prefix:], nothing, nothing, nothing, sizes, places, prefix, removed, memory)
            choice = how.choose(seen)
            x_NC, sizes, places, memory = _carried_out(x_NC, choice, seen)
            sites.append(Left(block, of_keys_NC, x_NC, choice.made_of))
        attention = block.attn
        y_NC = block.norm1(x_NC)
        count, heads = len(y_NC), attention.num_heads
        q, k, v = attention.qkv(y_NC).reshape(count, 3, heads, -1).permute(1, 2, 0, 3)
        if how.to_all:
            of_all = attention.qkv(block.norm1(of_keys_NC)).reshape(len(of_keys_NC), 3, heads, -1)
            _, k, v = of_all.permute(1, 2, 0, 3)
        q, k = attention.q_norm(q), attention.k_norm(k)
        logits = q @ k.transpose(-2, -1) * attention.scale
        if how.told:
            counted = of_keys if how.to_all else sizes
            logits[:, :, prefix:] += torch.tensor(counted, dtype=torch.float64).log()
        map_HNN = logits.softmax(-1)
        out_NC = attention.proj((map_HNN @ v).transpose(0, 1).reshape(count, -1))
        x_NC = x_NC + block.ls1(out_NC)
        if removed and not how.before:
            seen = Seen(x_NC[prefix:], map_HNN, k[:, prefix:], v[:, prefix:], sizes, places, prefix, removed, memory)
            if how.idles is None:
                x_NC, sizes, places, memory = _carried_out(x_NC, how.choose(seen), seen)
            else:
                if waiting_GC is None:
                    waiting_GC = x_NC[prefix:].clone()
                for row, i in enumerate(chosen):
                    waiting_GC[i], waiting_scores[i] = x_NC[prefix + row], how.idles(seen)[row]
                staying = len(chosen) - removed
                gone = set(lowest(waiting_scores, len(waiting_scores) - staying))
                chosen = [i for i in range(len(waiting_scores)) if i not in gone]
                x_NC = torch.cat([x_NC[:prefix], waiting_GC[chosen]])
                sizes = [1.0] * len(chosen)
        x_NC = x_NC + block.ls2(block.mlp(block.norm2(x_NC)))
    if waiting_GC is not None:
        waiting_GC[chosen] = x_NC[prefix:]
        x_NC = torch.cat([x_NC[:prefix], waiting_GC])
    if how.attends is not None:
        x_NC = everyone_back(x_NC, sites, prefix, how.attends)
    return model.forward_head(model.norm(x_NC[None]))


def _carried_out(x_NC: Tensor, choice: Choice, seen: Seen) -> tuple[Tensor, list[float], list[Any], Any]:
    rows = [sum(w * seen.x_nC[i] for i, w in made.items()) for _, made in choice.made_of]  # type: ignore[misc]
    keepers = [keeper for keeper, _ in choice.made_of]
    memory = None if choice.memory is None else [choice.memory[i] for i in keepers]
    sizes = choice.sizes or [1.0] * len(keepers)
    return torch.cat([x_NC[: seen.prefix], torch.stack(rows)]), sizes, [seen.places[i] for i in keepers], memory
