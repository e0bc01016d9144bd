"""Tokens and Groups: a strategy's input at a site, and its decision. Tensors, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.errors import OptionError


@dataclass(frozen=True, eq=False)
class Tokens:
    """A stream at a site: B images of N = prefix + n + suffix tokens, n of them patches, with C channels.

    x_BNC: the stream.
    k_BHND, v_BHND: keys and values of the block's attention, by head; None where the site stands before it.
    score_Bn: scores of the patches by that attention, of the strategy's `score`; None where that is "none".
    size_Bn: how many original patches each one stands for; None until the strategy has returned sizes.
    index_Bn: positions of the patches on `grid`, ascending.
    carried_Bn: what the strategy returned for itself at the site before; None at the first one.
    grid: the grid's sides in patches.
    removed: how many patches to remove.
    prefix, suffix: tokens before and after the patches.
    block: number of the attention block, from 0.
    """

    x_BNC: Tensor
    k_BHND: Tensor | None
    v_BHND: Tensor | None
    score_Bn: Tensor | None
    size_Bn: Tensor | None
    index_Bn: Tensor
    carried_Bn: Tensor | None
    grid: tuple[int, ...]
    removed: int
    prefix: int
    suffix: int
    block: int

    @property
    def patches_BnC(self) -> Tensor:
        """Return the patches of the stream."""
        return self.x_BNC.narrow(1, self.prefix, self.count)

    @property
    def keys_BnD(self) -> Tensor:
        """Return the patches' keys, averaged over heads, float32. Raises OptionError where there is no attention."""
        return self._of_patches(self.k_BHND).float().mean(dim=1)

    @property
    def values_BHnD(self) -> Tensor:
        """Return the patches' values. Raises OptionError where there is no attention."""
        return self._of_patches(self.v_BHND)

    @property
    def count(self) -> int:
        """Return n, the number of patches."""
        return self.x_BNC.shape[1] - self.prefix - self.suffix

    @property
    def sizes_Bn(self) -> Tensor:
        """Return `size_Bn`, or ones where the strategy has returned no sizes yet; float32."""
        if self.size_Bn is not None:
            return self.size_Bn
        return self.x_BNC.new_ones(self.x_BNC.shape[0], self.count, dtype=torch.float32)

    def _of_patches(self, x_BHND: Tensor | None) -> Tensor:
        if x_BHND is None:
            raise OptionError(
                "keys and values exist only where tokens are removed after the attention: leave before_attention out"
            )
        return x_BHND.narrow(2, self.prefix, self.count)


@dataclass(frozen=True, eq=False)
class Groups:
    """A site's decision: the kept and the removed patches, and what becomes of the removed ones.

    A kept token becomes own * itself + weights @ (the removed tokens).

    kept_BK, removed_BP: indices of the kept and the removed patches among the n = K + P, both ascending, so that tokens
        keep the grid's order.
    weights_BKP: how much of each removed token goes into each kept one; None where nothing does.
    own_BK: factor of a kept token itself; 1 where None.
    size_BK: how many original patches each kept token stands for now, which attention reads; None where it reads
        nothing.
    carried_Bn: one number for each patch of this site, for the strategy's next site.
    """

    kept_BK: Tensor
    removed_BP: Tensor
    weights_BKP: Tensor | None = None
    own_BK: Tensor | None = None
    size_BK: Tensor | None = None
    carried_Bn: Tensor | None = None


def split(score_Bn: Tensor, removed: int) -> tuple[Tensor, Tensor]:
    """Remove the `removed` lowest; of equal scores, the last ones. Returns kept_BK and removed_BP."""
    kept_BK, removed_BP = gtp_fx.select(score_Bn, removed)
    return kept_BK, removed_BP


def dropped(score_Bn: Tensor, removed: int, carried_Bn: Tensor | None = None) -> Groups:
    """Remove the lowest, and keep nothing of them."""
    return Groups(*split(score_Bn, removed), carried_Bn=carried_Bn)


def averaged(tokens: Tokens, kept_BK: Tensor, removed_BP: Tensor, into_BP: Tensor) -> Groups:
    """Merge each removed token into a kept one, which becomes the mean of all its members, weighted by their sizes.

    into_BP: which of the K kept tokens each removed one joins.
    """
    sizes_Bn = tokens.sizes_Bn
    sizes_BK, sizes_BP = sizes_Bn.gather(1, kept_BK), sizes_Bn.gather(1, removed_BP)
    joined_BKP = joins(into_BP, kept_BK.shape[1]) * sizes_BP[:, None, :]
    total_BK = sizes_BK + joined_BKP.sum(dim=2)
    return Groups(kept_BK, removed_BP, joined_BKP / total_BK[..., None], sizes_BK / total_BK, total_BK)


def joins(into_BP: Tensor, kept: int) -> Tensor:
    """Return [B, K, P] of 0 and 1, float32: 1 where the removed token joins the kept one."""
    places_K = torch.arange(kept, device=into_BP.device)
    return (into_BP[:, None, :] == places_K[None, :, None]).float()


def ranks_among(kept_BK: Tensor, index_BP: Tensor) -> Tensor:
    """Return [B, P]: the place of each entry of `index_BP` in `kept_BK` (ascending), which has to contain them all."""
    return (kept_BK[:, None, :] < index_BP[:, :, None]).sum(dim=2)
