"""What a strategy sees at a site, and what it decides: tensors, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.errors import OptionError


@dataclass(frozen=True, eq=False)
class Tokens:
    """A stream as it stands at a site: B images of N = prefix + n + suffix tokens, n of them patches, C channels.

    x_BNC: the stream. k_BHND, v_BHND: keys and values of the block's attention, heads apart; None where the site stands before it.
    score_Bn: of the patches by that attention, as the strategy's `score` says; None where it says none.
    size_Bn: how many original patches each stands for; None until the strategy has said so. index_Bn: where on `grid` (its
    sides) each stands, ascending. carried_Bn: what the strategy left for itself at the site before; None at the first one.
    leaving: how many patches are to leave. block: the number of the attention block, from 0.
    """

    x_BNC: Tensor
    k_BHND: Tensor | None
    v_BHND: Tensor | None
    score_Bn: Tensor | None
    size_Bn: Tensor | None
    index_Bn: Tensor
    carried_Bn: Tensor | None
    grid: tuple[int, ...]
    leaving: int
    prefix: int
    suffix: int
    block: int

    @property
    def patches_BnC(self) -> Tensor:
        return self.x_BNC.narrow(1, self.prefix, self.count)

    @property
    def keys_BnD(self) -> Tensor:
        """Of the patches, mean over heads, float32. Raises where the site stands before the attention."""
        return self._of_patches(self.k_BHND).float().mean(dim=1)

    @property
    def values_BHnD(self) -> Tensor:
        """Of the patches. Raises where the site stands before the attention."""
        return self._of_patches(self.v_BHND)

    @property
    def count(self) -> int:
        """n"""
        return self.x_BNC.shape[1] - self.prefix - self.suffix

    @property
    def sizes_Bn(self) -> Tensor:
        """`size_Bn`, of ones where the strategy has said nothing yet; float32."""
        if self.size_Bn is not None:
            return self.size_Bn
        return self.x_BNC.new_ones(self.x_BNC.shape[0], self.count, dtype=torch.float32)

    def _of_patches(self, x_BHND: Tensor | None) -> Tensor:
        if x_BHND is None:
            raise OptionError(
                "keys and values are there where tokens leave behind the attention: leave before_attention out"
            )
        return x_BHND.narrow(2, self.prefix, self.count)


@dataclass(frozen=True, eq=False)
class Groups:
    """Who stays, who leaves, and what becomes of those who leave.

    kept_BK, removed_BP: indices into the n = K + P patches, both ascending, so that the grid's order stands.
    weights_BKP: how much of each one that leaves goes into each that stays; None where nothing does. own_BK: how much of
    itself one that stays keeps; 1 where None. A kept token becomes own * itself + weights @ (those that left).
    size_BK: how many original patches each of those that stay now stands for, which attention is told; None to tell it nothing.
    carried_Bn: for the strategy's next site, a number a patch, of all that were there.
    """

    kept_BK: Tensor
    removed_BP: Tensor
    weights_BKP: Tensor | None = None
    own_BK: Tensor | None = None
    size_BK: Tensor | None = None
    carried_Bn: Tensor | None = None


def split(score_Bn: Tensor, leaving: int) -> tuple[Tensor, Tensor]:
    """kept_BK and removed_BP: the `leaving` lowest leave; of equal ones those from the back."""
    kept_BK, removed_BP = gtp_fx.select(score_Bn, leaving)
    return kept_BK, removed_BP


def dropped(score_Bn: Tensor, leaving: int, carried_Bn: Tensor | None = None) -> Groups:
    """The lowest leave, and nothing of them stays."""
    return Groups(*split(score_Bn, leaving), carried_Bn=carried_Bn)


def averaged(tokens: Tokens, kept_BK: Tensor, removed_BP: Tensor, into_BP: Tensor) -> Groups:
    """Each token that leaves joins one that stays, which becomes the mean of all, each as often as it stands for patches.

    into_BP: which of the K that stay.
    """
    sizes_Bn = tokens.sizes_Bn
    sizes_BK, sizes_BP = sizes_Bn.gather(1, kept_BK), sizes_Bn.gather(1, removed_BP)
    joined_BKP = joins(into_BP, kept_BK.shape[1]) * sizes_BP[:, None, :]
    total_BK = sizes_BK + joined_BKP.sum(dim=2)
    return Groups(kept_BK, removed_BP, joined_BKP / total_BK[..., None], sizes_BK / total_BK, total_BK)


def joins(into_BP: Tensor, kept: int) -> Tensor:
    """[B, K, P] of 0 and 1, float32: who joins whom."""
    places_K = torch.arange(kept, device=into_BP.device)
    return (into_BP[:, None, :] == places_K[None, :, None]).float()


def ranks_among(kept_BK: Tensor, index_BP: Tensor) -> Tensor:
    """[B, P]: which of `kept_BK` (ascending) each of `index_BP` is, all being among them."""
    return (kept_BK[:, None, :] < index_BP[:, :, None]).sum(dim=2)
