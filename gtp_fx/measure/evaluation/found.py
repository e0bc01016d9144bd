"""What was found on each image, and the sums and scores of that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from enum import Enum
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gtp_fx.capture.signatures import tensors_in
from gtp_fx.errors import OptionError
from gtp_fx.measure.evaluation.intervals import Estimate, difference, mean, share
from gtp_fx.plan.damage.divergence import divergence, scores_of

_BEST = 5


class Outputs(str, Enum):
    """What a model's outputs are."""

    classes = "classes"
    features = "features"


@dataclass(frozen=True)
class Found:
    """What was found on one image.

    place: its number in the set.
    original_1, original_5, optimised_1, optimised_5: whether the label is the model's best class, and whether it is
        among its best five; False where there is no label.
    same: whether both models predict the same class; False for features.
    divergence: how far the outputs are apart, as `gtp_fx.plan.damage.divergence`.
    cosine: cosine of the two outputs.
    """

    place: int
    original_1: bool
    original_5: bool
    optimised_1: bool
    optimised_5: bool
    same: bool
    divergence: float
    cosine: float


@dataclass(frozen=True)
class Sums:
    """Sums of what was found over some images, which add up over processes.

    lost: images that the original alone has right. won: that the optimised model alone has right.
    The last two are sums of squares.
    """

    images: float = 0
    original_1: float = 0
    original_5: float = 0
    optimised_1: float = 0
    optimised_5: float = 0
    same: float = 0
    lost: float = 0
    won: float = 0
    divergence: float = 0
    cosine: float = 0
    divergence_2: float = 0
    cosine_2: float = 0

    @classmethod
    def of(cls, rows: Iterable[Found]) -> Sums:
        """Return the sums of some images."""
        columns = (
            (
                1,
                r.original_1,
                r.original_5,
                r.optimised_1,
                r.optimised_5,
                r.same,
                r.original_1 and not r.optimised_1,
                r.optimised_1 and not r.original_1,
                r.divergence,
                r.cosine,
                r.divergence**2,
                r.cosine**2,
            )
            for r in rows
        )
        return cls(*map(sum, zip(*columns, strict=True)))

    def plus(self, others: Sequence[float]) -> Sums:
        """Return these and other sums, given in the fields' order, together."""
        return Sums(*(a + b for a, b in zip(astuple(self), others, strict=True)))

    def counts(self) -> dict[str, int]:
        """Return the whole numbers among them by name."""
        names = [field.name for field in fields(self)][:8]
        return {name: int(getattr(self, name)) for name in names}

    @property
    def original(self) -> tuple[Estimate, Estimate]:
        """Top-1 and top-5 of the original."""
        return share(self.original_1, self.images), share(self.original_5, self.images)

    @property
    def optimised(self) -> tuple[Estimate, Estimate]:
        """Top-1 and top-5 of the optimised model."""
        return share(self.optimised_1, self.images), share(self.optimised_5, self.images)

    @property
    def gained(self) -> Estimate:
        """Top-1 of the optimised model, less the original's; the interval is of pairs, since both saw each image."""
        return difference(self.lost, self.won, self.images)

    @property
    def agreement(self) -> Estimate:
        """Share of images for which both predict the same class."""
        return share(self.same, self.images)

    @property
    def mean_divergence(self) -> Estimate:
        """Mean over images."""
        return mean(self.images, self.divergence, self.divergence_2)

    @property
    def mean_cosine(self) -> Estimate:
        """Mean over images."""
        return mean(self.images, self.cosine, self.cosine_2)


def outputs_of(model: nn.Module, output: Any, given: str = "auto") -> Outputs:
    """Return what a model's outputs are, by one of them.

    given: "auto", or what the user says they are.

    A tensor [B, V], or what a Hugging Face model names logits, is scores of classes, unless the model says that it has
    no classes (timm's `num_classes=0`). Anything else is features.

    Raises OptionError where they can't be what the user says.
    """
    if given not in ("auto", *(kind.value for kind in Outputs)):
        raise OptionError(f"compare={given!r}: give 'auto', 'classes' or 'features'")
    scores = scores_of(output)
    if given == Outputs.classes and scores is None:
        shapes = [list(t.shape) for t in tensors_in(output)]
        raise OptionError(f"compare='classes': {type(model).__name__} returns {shapes}, no scores [images, classes]")
    if given != "auto":
        return Outputs(given)
    headless = getattr(model, "num_classes", None) == 0
    return Outputs.features if scores is None or headless else Outputs.classes


def compared(output: Any, kind: Outputs) -> list[Tensor]:
    """Return the tensors of an output that are compared, on the CPU: the scores [B, V], or features, [B, C] each."""
    if kind is Outputs.classes:
        scores = scores_of(output)
        assert scores is not None, "the model's first output had some"
        return [scores.detach().float().cpu()]
    return [t.detach().float().cpu().flatten(1) for t in tensors_in(output) if t.is_floating_point()]


def found_on(
    original: Sequence[Tensor],
    optimised: Sequence[Tensor],
    kind: Outputs,
    labels: Sequence[int],
    places: Sequence[int],
) -> Iterator[Found]:
    """Yield what is found on each image of a batch, from both models' `compared` outputs on it."""
    flat = [[t.flatten(1).double() for t in tensors] for tensors in (original, optimised)]
    cosines = sum(F.cosine_similarity(a, b, dim=1) for a, b in zip(*flat, strict=True)) / len(original)
    assert isinstance(cosines, Tensor)
    best = [_best(tensors[0], kind) for tensors in (original, optimised)]
    for i, (label, place) in enumerate(zip(labels, places, strict=True)):
        before, since = (five[i] for five in best)
        now, then = ([t[i : i + 1] for t in tensors] for tensors in (optimised, original))
        # Scores are told from features by not being in a list.
        moved = divergence(now[0], then[0]) if kind is Outputs.classes else divergence(now, then)
        yield Found(
            place,
            before[:1] == [label],
            label in before,
            since[:1] == [label],
            label in since,
            kind is Outputs.classes and before[0] == since[0],
            moved,
            float(cosines[i]),
        )


def _best(scores_BV: Tensor, kind: Outputs) -> list[list[int]]:
    """Return each image's best five classes; none where there are no classes."""
    if kind is Outputs.features:
        return [[] for _ in scores_BV]
    best: list[list[int]] = scores_BV.topk(min(_BEST, scores_BV.shape[1]), dim=1).indices.tolist()
    return best
