"""Families of ATen operators, each listed once, by name: a new overload is added here and known everywhere."""

from __future__ import annotations

import operator
from typing import Any

from torch.ops import aten  # type: ignore[import-not-found]

Family = tuple[Any, ...]

# ---- products

ATTENTION: Family = (aten.scaled_dot_product_attention.default,)
MATRIX_PRODUCTS: Family = (aten.matmul.default, aten.bmm.default)
PRODUCTS_ADDED_TO: Family = (aten.addmm.default, aten.baddbmm.default)
CONVOLUTIONS: Family = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
POOLINGS: Family = (aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default)
GRID_MAKERS: Family = (*CONVOLUTIONS, *POOLINGS)
"""Operators at which a grid of patches may begin."""

# ---- reductions, norms, randomness

SOFTMAXES: Family = (aten.softmax.int, aten._softmax.default)
FEATURE_NORMS: Family = (aten.layer_norm.default, aten.rms_norm.default)
CHANNEL_NORMS: Family = (
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.group_norm.default,
)
DROPOUTS: Family = (aten.dropout.default, aten.native_dropout.default)

# ---- the same numbers, in another shape, place or type

VIEWS: Family = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
FLATTENINGS: Family = (aten.flatten.using_ints, aten.unflatten.int)
SQUEEZES: Family = (aten.squeeze.dim, aten.squeeze.dims)
PERMUTATIONS: Family = (aten.permute.default, aten.transpose.int)
COPIES: Family = (aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default)
REARRANGED: Family = (aten.clone.default, aten.contiguous.default)
"""Copies in another memory layout."""
CASTS: Family = (aten.to.dtype, aten._to_copy.default)
CASTS_LIKE: Family = (aten.type_as.default, aten.to.other)
SPLITS: Family = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
PADDINGS: Family = (aten.pad.default, aten.constant_pad_nd.default)
RESIZINGS: Family = (
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
    aten.upsample_nearest2d.vec,
    aten._upsample_bicubic2d_aa.vec,
    aten._upsample_bilinear2d_aa.vec,
)
PICKS_BY_INDEX: Family = (
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.embedding.default,
)
"""What picks entries of its first operand by numbers in another."""
WITHOUT_COPY: Family = (
    *SPLITS,
    *PERMUTATIONS,
    aten.detach.default,
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.unbind.int,
    aten.unsqueeze.default,
    operator.getitem,
)
"""Views that a compiler folds into what reads them."""

# ---- new tensors

CONSTANTS: Family = (
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.full.default,
    aten.ones.default,
    aten.zeros.default,
    aten.scalar_tensor.default,
)
LIKE_ANOTHER: Family = (aten.ones_like.default, aten.zeros_like.default)

# ---- elementwise

DIVISIONS: Family = (aten.div.Tensor, aten.div.Scalar)
SCALINGS: Family = (aten.mul.Tensor, aten.mul.Scalar, *DIVISIONS)
COMPARISONS_WITH_NUMBER: Family = (
    aten.eq.Scalar,
    aten.ne.Scalar,
    aten.ge.Scalar,
    aten.gt.Scalar,
    aten.le.Scalar,
    aten.lt.Scalar,
)
CHOICES: Family = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
BINARY: Family = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.div.Tensor_mode,
    aten.eq.Tensor,
    aten.ge.Tensor,
    aten.gt.Tensor,
    aten.le.Tensor,
    aten.lt.Tensor,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.pow.Tensor_Tensor,
    *CHOICES,
)
"""Element-wise operators of several tensors."""
UNARY: Family = (
    *COPIES,
    *REARRANGED[1:],
    *CASTS,
    *LIKE_ANOTHER,
    *COMPARISONS_WITH_NUMBER,
    aten.dropout.default,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.pow.Tensor_Scalar,
    aten.pow.Scalar,
    aten.bitwise_not.default,
    aten.logical_not.default,
    aten.hardtanh.default,
    aten.mish.default,
    aten.relu6.default,
    aten.selu.default,
    aten.sign.default,
    aten.square.default,
    aten.to.device,
    aten.to.dtype_layout,
    aten.expm1.default,
    aten.log1p.default,
    aten.abs.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.cos.default,
    aten.detach.default,
    aten.elu.default,
    aten.erf.default,
    aten.exp.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.leaky_relu.default,
    aten.log.default,
    aten.neg.default,
    aten.reciprocal.default,
    aten.relu.default,
    aten.rsqrt.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.sin.default,
    aten.softplus.default,
    aten.sqrt.default,
    aten.tanh.default,
)
"""Element-wise operators of one tensor."""
MASK_ARITHMETIC: Family = (
    *CHOICES,
    *COMPARISONS_WITH_NUMBER,
    *LIKE_ANOTHER,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.ge.Tensor,
    aten.le.Tensor,
    aten.eq.Tensor,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_not.default,
    aten.logical_and.default,
    aten.logical_not.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.to.dtype,
    aten.masked_fill.Scalar,
)
"""Operators that masks are built with. Their result for one image is their result for each."""
