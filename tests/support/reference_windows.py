"""Branch placement by hand: blocks whose stream keeps its grid, while some tokens of each window skip the MLP.

For each family of models a function takes a block's own modules as far as the branch: the residual stream, a score for
each token of each window, and what the branch computes. `by_hand` does the rest in loops over images and windows.
Nothing here is the product's.

Letters in tensor names: B images, N tokens of the stream in the block's own order, W windows, n tokens in each,
H heads, D channels of a head, C channels, K kept, P propagated, R coordinates. Windows are index lists, -1 for padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.reference import select, token_scores

CLEAR = 1e-5
"""A choice is clear where scores around the cut are that far apart, as a share of the higher."""


@dataclass(frozen=True, eq=False)
class Windows:
    """index_Wn: which tokens of the stream each window holds, row by row. places_NR: where those are on the image."""

    index_Wn: Tensor
    places_NR: Tensor

    def of(self, x_BNC: Tensor) -> Tensor:
        """[B, W, n, C]; padding is 0."""
        return F.pad(x_BNC, (0, 0, 0, 1))[:, self.index_Wn]

    def back(self, x_BWnC: Tensor) -> Tensor:
        """[B, N, C]; padding is left out."""
        inside_Wn = self.index_Wn >= 0
        x_BNC = x_BWnC.new_full((len(x_BWnC), len(self.places_NR), x_BWnC.shape[-1]), torch.nan)
        x_BNC[:, self.index_Wn[inside_Wn]] = x_BWnC[:, inside_Wn]
        return x_BNC


@dataclass(frozen=True, eq=False)
class Parts:
    """A block by hand as far as its branch.

    stream_BNC: after the attention's residual add.
    enters_BNC: input of the branch's token-wise part; the stream itself where None.
    branch: on any tokens.
    whole: [B, N, C] as the block returns it.
    """

    stream_BNC: Tensor
    score_BWn: Tensor
    windows: Windows
    branch: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], Any]
    enters_BNC: Tensor | None = None


def by_hand(parts: Parts, propagated: int, mean: float | None = None) -> Any:
    """Return the block's output where `propagated` tokens a window skip the branch.

    mean: the share of their window's mean result that they get; None for their neighbours' results.
    """
    enters_BNC = parts.stream_BNC if parts.enters_BNC is None else parts.enters_BNC
    added_BNC = skipped(
        parts.windows, parts.score_BWn, propagated, lambda i, index: parts.branch(enters_BNC[i, index]), mean
    )
    return parts.whole(parts.stream_BNC + added_BNC)


def skipped(
    windows: Windows, score_BWn: Tensor, propagated: int, made: Callable[[int, Tensor], Tensor], mean: float | None
) -> Tensor:
    """Return [B, N, C]: `made` of an image's kept tokens [K]; for the others, the mean over their neighbours, or the
    share `mean` of that over their window."""
    places_NR = windows.places_NR
    touch_NN = (places_NR[:, None] - places_NR[None]).abs().amax(dim=-1) == 1
    added_BNC: list[Tensor] = []
    for image in range(len(score_BWn)):
        added_NC = torch.full((len(places_NR), made(image, torch.tensor([0])).shape[-1]), torch.nan)
        for index_n, score_n in zip(windows.index_Wn, score_BWn[image], strict=True):
            # Padding leaves before any token does, from the back.
            score_n = torch.where(index_n < 0, -1.0 - torch.arange(len(index_n)), score_n)
            kept_K, left_P = index_n, index_n[:0]
            if propagated:
                kept_1K, left_1P, gap_1 = select(score_n[None], propagated)
                assert gap_1.item() > CLEAR, "scores around the cut are too close to ask for the same choice"
                kept_K, left_P = index_n[kept_1K[0]], index_n[left_1P[0]]
            kept_K, left_P, members = kept_K[kept_K >= 0], left_P[left_P >= 0], index_n[index_n >= 0]
            if not len(members):
                continue
            made_KC = made(image, kept_K)
            added_NC[kept_K] = made_KC
            degree_N = touch_NN[:, members].sum(dim=1)
            for token in left_P:
                share_K = touch_NN[token, kept_K] / degree_N[kept_K].clamp(min=1).sqrt()
                if not share_K.any():
                    square_K = (places_NR[kept_K] - places_NR[token]).square().sum(dim=1)
                    share_K = F.one_hot((square_K == square_K.min()).nonzero()[0, 0], len(kept_K)).float()
                share_K = share_K / share_K.sum()
                added_NC[token] = share_K @ made_KC if mean is None else mean * made_KC.mean(dim=0)
        added_BNC.append(added_NC)
    return torch.stack(added_BNC)


def cut(canvas: Tensor, window: Sequence[int]) -> Tensor:
    """[W, n]: a plane in windows, row by row, each row by row."""
    height, width = window
    return torch.stack(
        [
            canvas[row : row + height, column : column + width].flatten()
            for row in range(0, canvas.shape[0], height)
            for column in range(0, canvas.shape[1], width)
        ]
    )


def canvas(grid: Sequence[int], window: Sequence[int], shift: Sequence[int], pad_first: bool) -> Tensor:
    """Return a grid's tokens as indices, padded at the end with -1 to whole windows and rolled by -`shift`, in either
    order."""
    index = torch.arange(grid[0] * grid[1]).reshape(grid[0], grid[1])
    back = [-by for by in shift]
    if not pad_first:
        index = index.roll(back, (0, 1))
    index = F.pad(index, (0, -grid[1] % window[1], 0, -grid[0] % window[0]), value=-1)
    return index.roll(back, (0, 1)) if pad_first else index


def plane(grid: Sequence[int]) -> Tensor:
    return torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))


def of_grid(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int] = (0, 0), pad_first: bool = False
) -> Windows:
    return Windows(cut(canvas(grid, window, shift, pad_first), window), plane(grid))


def shift_mask(sides: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """[W, n, n]: -100 between tokens that were brought side by side only by the rolling (Swin's)."""
    rows, columns = (
        (torch.arange(side) >= side - of).long() + (torch.arange(side) >= side - by).long()
        for side, of, by in zip(sides, window, shift, strict=True)
    )
    label_Wn = cut(rows[:, None] * 3 + columns, window)
    return -100.0 * (label_Wn[:, :, None] != label_Wn[:, None, :])


def attend(q: Tensor, k: Tensor, v: Tensor, scale: Any, bias: Any = 0.0) -> tuple[Tensor, Tensor]:
    """[B, W, H, n, D] -> the output [B, W, n, C] and the scores [B, W, n]. scale: a number, or [H, 1, 1]."""
    map_BWHnn = (q @ k.transpose(-2, -1) * scale + bias).softmax(dim=-1)
    score_BWn = token_scores(map_BWHnn.flatten(0, 1), 0, "mixed-max").unflatten(0, q.shape[:2])
    return (map_BWHnn @ v).transpose(2, 3).flatten(3), score_BWn


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, W, n, 3·H·D] -> three times [B, W, H, n, D]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    return q, k, v


def decomposed(q_BWHnD: Tensor, rows: Tensor, columns: Tensor, sides: Sequence[int]) -> Tensor:
    """[B, W, H, n, n]: q·(row embedding of the distance) + q·(column embedding of it), SAM's relative positions."""
    places = plane(sides)
    apart = places[:, None] - places[None]
    rows_nnD, columns_nnD = rows[apart[..., 0] + sides[0] - 1], columns[apart[..., 1] + sides[1] - 1]
    return torch.einsum("bwhqd,qkd->bwhqk", q_BWHnD, rows_nnD + columns_nnD)


def swin(block: Any, x_BHWC: Tensor) -> Parts:
    """timm: rolled, then padded."""
    grid, attn = x_BHWC.shape[1:3], block.attn
    windows = of_grid(grid, block.window_size, block.shift_size)
    x_BNC = x_BHWC.flatten(1, 2)
    qkv = attn.qkv(windows.of(block.norm1(x_BNC)))
    bias = attn._get_rel_pos_bias()[None]
    if any(block.shift_size):
        padded = [side + -side % window for side, window in zip(grid, block.window_size, strict=True)]
        bias = bias + shift_mask(padded, block.window_size, block.shift_size)[None, :, None]
    made, score = attend(*split_heads(qkv, attn.num_heads), attn.scale, bias)
    stream = x_BNC + windows.back(attn.proj(made))
    return Parts(stream, score, windows, lambda t: block.mlp(block.norm2(t)), lambda y: y.reshape(x_BHWC.shape))


def swin_v2(block: Any, x_BHWC: Tensor) -> Parts:
    """timm: cosine attention, and norms behind attention and MLP."""
    grid, attn = x_BHWC.shape[1:3], block.attn
    windows = of_grid(grid, block.window_size, block.shift_size)
    x_BNC = x_BHWC.flatten(1, 2)
    added = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    q, k, v = split_heads(F.linear(windows.of(x_BNC), attn.qkv.weight, added), attn.num_heads)
    table = attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2)
    bias = 16 * table[attn.relative_position_index].permute(2, 0, 1).sigmoid()
    if any(block.shift_size):
        padded = [side + -side % window for side, window in zip(grid, block.window_size, strict=True)]
        bias = bias + shift_mask(padded, block.window_size, block.shift_size)[None, :, None]
    scale = attn.logit_scale.clamp(max=torch.log(torch.tensor(100.0))).exp()
    made, score = attend(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale, bias)
    stream = x_BNC + block.norm1(windows.back(attn.proj(made)))
    return Parts(stream, score, windows, lambda t: block.norm2(block.mlp(t)), lambda y: y.reshape(x_BHWC.shape))


def swin_torchvision(block: Any, x_BHWC: Tensor) -> Parts:
    """Padded, then rolled, by what is padding among others."""
    grid, attn = x_BHWC.shape[1:3], block.attn
    padded = [side + -side % window for side, window in zip(grid, attn.window_size, strict=True)]
    shift = [0 if w >= side else by for w, side, by in zip(attn.window_size, padded, attn.shift_size, strict=True)]
    windows = of_grid(grid, attn.window_size, shift, pad_first=True)
    x_BNC = x_BHWC.flatten(1, 2)
    bias = attn.get_relative_position_bias()[None]
    if any(shift):
        bias = bias + shift_mask(padded, attn.window_size, shift)[None, :, None]
    q, k, v = split_heads(attn.qkv(windows.of(block.norm1(x_BNC))), attn.num_heads)
    made, score = attend(q, k, v, q.shape[-1] ** -0.5, bias)
    stream = x_BNC + windows.back(attn.proj(made))
    return Parts(stream, score, windows, lambda t: block.mlp(block.norm2(t)), lambda y: y.reshape(x_BHWC.shape))


def swin_hf(layer: Any, x_BNC: Tensor, grid: tuple[int, int], *_: Any) -> Parts:
    """transformers: padded, then rolled."""
    attn, window, shift = layer.attention, (layer.window_size,) * 2, (layer.shift_size,) * 2
    windows = of_grid(grid, window, shift, pad_first=True)
    bias = attn.relative_position_bias()[None]
    if layer.shift_size:
        padded = [side + -side % layer.window_size for side in grid]
        bias = bias + shift_mask(padded, window, shift)[None, :, None]
    rows = windows.of(layer.layernorm_before(x_BNC))
    q, k, v = (
        p(rows).unflatten(-1, (-1, attn.head_dim)).transpose(2, 3) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    made, score = attend(q, k, v, attn.scaling, bias)
    stream = x_BNC + windows.back(attn.o_proj(made))
    return Parts(stream, score, windows, lambda t: layer.mlp(layer.layernorm_after(t)), lambda y: y)


def sam(block: Any, x_BHWC: Tensor) -> Parts:
    """timm's and transformers': windows with padding behind, or the whole grid; relative positions along both sides."""
    ours = {"heads": "num_heads", "before": "norm1", "behind": "norm2"}
    if not hasattr(block, "norm1"):
        ours = {"heads": "num_attention_heads", "before": "layer_norm1", "behind": "layer_norm2"}
    before, behind = getattr(block, ours["before"]), getattr(block, ours["behind"])
    grid, attn = x_BHWC.shape[1:3], block.attn
    sides = (block.window_size,) * 2 if block.window_size else tuple(grid)
    windows = of_grid(grid, sides)
    x_BNC = x_BHWC.flatten(1, 2)
    q, k, v = split_heads(attn.qkv(windows.of(before(x_BNC))), getattr(attn, ours["heads"]))
    made, score = attend(q, k, v, attn.scale, decomposed(q, attn.rel_pos_h, attn.rel_pos_w, sides))
    stream = x_BNC + windows.back(attn.proj(made))
    return Parts(stream, score, windows, lambda t: block.mlp(behind(t)), lambda y: y.reshape(x_BHWC.shape))


def hieradet(block: Any, x_BHWC: Tensor) -> Parts:
    """timm's SAM 2: windows with padding behind, or the whole grid. Blocks that pool their queries are others."""
    assert block.q_stride is None and block.dim == block.dim_out
    grid, attn = x_BHWC.shape[1:3], block.attn
    windows = of_grid(grid, block.window_size if block.is_windowed else tuple(grid))
    x_BNC = x_BHWC.flatten(1, 2)
    q, k, v = split_heads(attn.qkv(windows.of(block.norm1(x_BNC))), attn.num_heads)
    made, score = attend(q, k, v, attn.scale)
    stream = x_BNC + block.ls1(windows.back(attn.proj(made)))
    return Parts(
        stream, score, windows, lambda t: block.ls2(block.mlp(block.norm2(t))), lambda y: y.reshape(x_BHWC.shape)
    )


def vitdet(layer: Any, x_BCHW: Tensor, *_: Any) -> Parts:
    """transformers, without relative positions; maps with channels first between blocks."""
    grid, attn = x_BCHW.shape[2:], layer.attention
    windows = of_grid(grid, (layer.window_size,) * 2 if layer.window_size else grid)
    x_BNC = x_BCHW.flatten(2).transpose(1, 2)
    qkv = attn.qkv(windows.of(layer.norm1(x_BNC)))
    made, score = attend(*split_heads(qkv, attn.num_heads), attn.scale)
    stream = x_BNC + windows.back(attn.proj(made))
    return Parts(
        stream,
        score,
        windows,
        lambda t: layer.mlp(layer.norm2(t)),
        lambda y: (y.transpose(1, 2).reshape(x_BCHW.shape),),
    )


def maxvit(block: Any, x_BHWC: Tensor) -> Parts:
    """timm's PartitionAttentionCl: blocks of neighbours, or grids of tokens far apart."""
    grid, attn = x_BHWC.shape[1:3], block.attn
    windows = of_grid(grid, block.partition_size)
    if not block.partition_block:
        index = torch.arange(grid[0] * grid[1]).reshape(grid[0], grid[1])
        down, right = (side // of for side, of in zip(grid, block.partition_size, strict=True))
        apart = [index[row::down, column::right].flatten() for row in range(down) for column in range(right)]
        windows = Windows(torch.stack(apart), plane(grid))
    x_BNC = x_BHWC.flatten(1, 2)
    qkv = attn.qkv(windows.of(block.norm1(x_BNC)))
    if attn.head_first:
        q, k, v = qkv.unflatten(-1, (attn.num_heads, -1)).transpose(2, 3).chunk(3, dim=-1)
    else:
        q, k, v = split_heads(qkv, attn.num_heads)
    made, score = attend(q, k, v, attn.scale, attn.rel_pos.get_bias()[None])
    stream = x_BNC + block.ls1(windows.back(attn.proj(made)))
    return Parts(
        stream, score, windows, lambda t: block.ls2(block.mlp(block.norm2(t))), lambda y: y.reshape(x_BHWC.shape)
    )


def hiera(model: Any) -> Callable[..., Parts]:
    """timm: tokens unrolled into mask units, so that pooling takes the maximum of the front and what follows."""
    size = model.unroll.size
    where_NR = plane(size)[model.unroll(torch.arange(size[0] * size[1])[None, :, None])[0, :, 0]]

    def parts(block: Any, x_BNC: Tensor) -> Parts:
        attn, count = block.attn, x_BNC.shape[1]
        assert attn.q_stride == 1 and not block.do_expand, "its queries are pooled"
        shrunk = int((len(where_NR) / count) ** 0.5)
        places_NR = where_NR[:count] // shrunk
        index_Wn = torch.arange(count)[None]
        if attn.use_mask_unit_attn:
            index_Wn = torch.arange(count).reshape(attn.window_size, -1).T
        rows = [sorted(index.tolist(), key=lambda i: places_NR[i].tolist()) for index in index_Wn]
        windows = Windows(torch.tensor(rows), places_NR)
        qkv = attn.qkv(windows.of(block.norm1(x_BNC)))
        made, score = attend(*split_heads(qkv, attn.heads), attn.scale)
        stream = x_BNC + block.ls1(windows.back(attn.proj(made)))
        return Parts(stream, score, windows, lambda t: block.ls2(block.mlp(block.norm2(t))), lambda y: y)

    return parts


def twins(block: Any, x_BNC: Tensor, grid: Sequence[int]) -> Parts:
    """timm: windows with padding behind, or queries to pooled keys (`cells`)."""
    attn = block.attn
    if not hasattr(attn, "ws"):
        asking_BNC = block.norm1(x_BNC)
        map_BCHW = asking_BNC.transpose(1, 2).reshape(len(x_BNC), -1, *grid)
        pooled_BMC = attn.norm(attn.sr(map_BCHW).flatten(2).transpose(1, 2))
        q = attn.q(asking_BNC).unflatten(-1, (attn.num_heads, -1))
        k, v = attn.kv(pooled_BMC).unflatten(-1, (2, attn.num_heads, -1)).unbind(2)
        made, score = cells(q, k, v, grid, attn.sr_ratio)
        windows, made = of_grid(grid, grid), attn.proj(made)
    else:
        windows = of_grid(grid, (attn.ws, attn.ws))
        qkv = attn.qkv(windows.of(block.norm1(x_BNC)))
        made, score = attend(*split_heads(qkv, attn.num_heads), attn.scale)
        made = attn.proj(windows.back(made))
    return Parts(x_BNC + made, score, windows, lambda t: block.mlp(block.norm2(t)), lambda y: y)


def cells(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, grid: Sequence[int], ratio: int) -> tuple[Tensor, Tensor]:
    """Attend to cells of ratio² tokens. A token's score is what it pays its own cell, times what that cell receives."""
    q, k, v = (part.transpose(1, 2) for part in (q_BNHD, k_BMHD, v_BMHD))
    map_BHNM = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    places = plane(grid) // ratio
    cell_N = places[:, 0] * (grid[1] // ratio) + places[:, 1]
    own_BN = map_BHNM[:, :, torch.arange(len(cell_N)), cell_N].amax(dim=1)
    received_BN = map_BHNM.sum(dim=2)[:, :, cell_N].amax(dim=1)
    return (map_BHNM @ v).transpose(1, 2).flatten(2), (own_BN * received_BN)[:, None]


def nest(block: Any, x_BTNC: Tensor) -> Parts:
    """timm's TransformerLayer: the stream is in blocks already."""
    attn, (_, count, tokens, _) = block.attn, x_BTNC.shape
    across, side = int(count**0.5), int(tokens**0.5)
    order = cut(torch.arange(count * tokens).reshape(across * side, -1), (side, side)).flatten()
    windows = Windows(torch.arange(count * tokens).reshape(count, tokens), plane((across * side,) * 2)[order])
    x_BNC = x_BTNC.flatten(1, 2)
    qkv = attn.qkv(windows.of(block.norm1(x_BNC)))
    made, score = attend(*split_heads(qkv, attn.num_heads), attn.scale)
    made = made.unflatten(-1, (attn.num_heads, -1)).transpose(-2, -1).flatten(-2)  # its heads vary fastest
    stream = x_BNC + windows.back(attn.proj(made))
    return Parts(stream, score, windows, lambda t: block.mlp(block.norm2(t)), lambda y: y.reshape(x_BTNC.shape))


def pvt(block: Any, x_BNC: Tensor, grid: Sequence[int]) -> Parts:
    """timm's PVT v2: keys pooled, and an MLP with a convolution in the middle; only what follows that is token-wise."""
    attn, mlp = block.attn, block.mlp
    asking_BNC = keys_BMC = block.norm1(x_BNC)
    if attn.sr is not None:
        map_BCHW = asking_BNC.transpose(1, 2).reshape(len(x_BNC), -1, *grid)
        keys_BMC = attn.norm(attn.sr(map_BCHW).flatten(2).transpose(1, 2))
    q = attn.q(asking_BNC).unflatten(-1, (attn.num_heads, -1))
    k, v = attn.kv(keys_BMC).unflatten(-1, (2, attn.num_heads, -1)).unbind(2)
    made, score = cells(q, k, v, grid, attn.sr.stride[0] if attn.sr is not None else 1)
    stream = x_BNC + attn.proj(made)
    inner_BNC = mlp.fc1(block.norm2(stream))
    inner_BNC = mlp.dwconv(inner_BNC.transpose(1, 2).unflatten(2, tuple(grid))).flatten(2).transpose(1, 2)
    return Parts(stream, score, of_grid(grid, grid), lambda t: mlp.fc2(mlp.act(t)), lambda y: y, inner_BNC)


Oracle = Callable[..., Parts]
"""(block, *what it is called with) -> its parts."""


class ByHand:
    """Runs a model with some blocks' outputs replaced by those computed by hand. seen: each block's parts, by name."""

    def __init__(
        self,
        model: nn.Module,
        oracle: Oracle,
        blocks: dict[str, int],
        mean: float | None = None,
    ) -> None:
        """blocks: how many tokens of each window skip the branch there, by the name of the block's module."""
        self.model, self.oracle, self.blocks, self.mean = model, oracle, blocks, mean
        self.seen: dict[str, Parts] = {}

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        handles = [
            self.model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True)
            for name in self.blocks
        ]
        try:
            return self.model(*args)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def replace(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            self.seen[name] = parts = self.oracle(module, *args, *kwargs.values())
            made = by_hand(parts, self.blocks[name], self.mean)
            if isinstance(output, tuple) and not isinstance(made, tuple):
                return (made, *output[1:])
            return made

        return replace
