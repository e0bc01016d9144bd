"""Families of ATen operators, each listed once, by name: a new overload is added here and known everywhere."""

from __future__ import annotations

import operator
from typing import Any

from torch.ops import aten  # type: ignore[import-not-found]

Family = tuple[Any, ...]

# ---- products

ATTENTION: Family = (aten.scaled_dot_product_attention.default,)
MATRIX_PRODUCTS: Family = (aten.matmul.default, aten.bmm.default, aten.mm.default)
PRODUCTS_ADDED_TO: Family = (aten.addmm.default, aten.baddbmm.default)
CONVOLUTIONS: Family = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
TRANSPOSED_CONVOLUTIONS: Family = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_WITHOUT_FORMULA = """
    _addmm_activation _cdist_forward _cholesky_solve_helper _compute_linear_combination _conv_depthwise2d
    _cslt_sparse_mm _cudnn_attention_forward _cudnn_rnn _dyn_quant_matmul_4bit _euclidean_dist
    _flash_attention_forward_no_dropout_inplace _foreach_mm _grouped_mm _int_mm _linalg_det _linalg_eigh
    _linalg_eigvals _linalg_slogdet _linalg_solve_ex _linalg_svd _lstm_mps _mixed_dtypes_linear _mps_convolution
    _mps_convolution_transpose _native_multi_head_attention _nnpack_spatial_convolution
    _scaled_dot_product_attention_math_for_mps _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_fused_attention_overrideable _scaled_grouped_mm _scaled_grouped_mm_v2 _scaled_mm_v2
    _sparse_addmm _sparse_mm_reduce_impl _sparse_semi_structured_addmm _sparse_semi_structured_linear
    _sparse_semi_structured_mm _sparse_sparse_matmul _spsolve _transformer_encoder_layer_fwd _trilinear
    _triton_multi_head_attention _triton_scaled_dot_attention _weight_int4pack_mm _weight_int4pack_mm_for_cpu
    _weight_int4pack_mm_with_scales_and_zeros _weight_int8pack_mm addbmm cholesky_inverse cholesky_solve
    conv_depthwise3d conv_tbc cudnn_convolution_add_relu cudnn_convolution_relu cudnn_convolution_transpose
    deform_conv2d geqrf hspmm linalg_cholesky_ex linalg_eig linalg_householder_product linalg_inv_ex
    linalg_ldl_factor_ex linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor_ex linalg_lu_solve linalg_matrix_exp
    linalg_matrix_sqrth linalg_pinv linalg_polar linalg_qr linalg_solve_triangular miopen_convolution
    miopen_convolution_add_relu miopen_convolution_relu miopen_convolution_transpose miopen_depthwise_convolution
    miopen_rnn mkldnn_convolution mkldnn_linear mkldnn_rnn_layer ormqr quantized_gru quantized_lstm
    slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d
    sparse_sampled_addmm triangular_solve
    """
PRODUCTS_WITHOUT_FORMULA: frozenset[str] = frozenset(_WITHOUT_FORMULA.split())
"""Names of operators that multiply or factorise matrices, call no others, and have no formula in torch's registry.

Products with a vector (mv, dot) aren't among them: they are sums like any reduction, and count as nothing there, too.
"""
POOLINGS: Family = (
    aten.max_pool1d.default,
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.max_pool3d.default,
)
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
VIEWS_LIKE: Family = (aten.view_as.default, aten.reshape_as.default)
"""Views in the shape of another tensor."""
FLATTENINGS: Family = (aten.flatten.using_ints, aten.unflatten.int)
SQUEEZES: Family = (aten.squeeze.dim, aten.squeeze.dims)
PERMUTATIONS: Family = (aten.permute.default, aten.transpose.int)
COPIES: Family = (aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default)
REARRANGED: Family = (aten.clone.default, aten.contiguous.default)
"""Copies in another memory layout."""
CASTS: Family = (aten.to.dtype, aten._to_copy.default)
CASTS_LIKE: Family = (aten.type_as.default, aten.to.other)
SPLITS: Family = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
NAMED_DIMENSIONS: dict[Any, int] = {
    **dict.fromkeys((aten.mean.dim, aten.amax.default, aten.amin.default, aten.sum.dim_IntList), 1),
    **dict.fromkeys(
        (*SOFTMAXES, *SQUEEZES, aten.var.correction, aten.slice.Tensor, aten.select.int, aten.cat.default), 1
    ),
    **dict.fromkeys((*SPLITS, aten.linalg_vector_norm.default), 2),
}
"""The position of the argument that names dimensions, one or several, of its first operand."""
TOKEN_WISE_DIMENSIONS: dict[Any, int] = {
    **NAMED_DIMENSIONS,
    **dict.fromkeys((aten.logsumexp.default, aten.log_softmax.int, aten.flip.default, aten.index_select.default), 1),
    **dict.fromkeys((aten.roll.default, aten.repeat_interleave.self_int), 2),
}
"""The same, and of operators that are only followed on rows of tokens, where the dimension is features."""
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
LIKE_ANOTHER: Family = (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default)

# ---- elementwise

DIVISIONS: Family = (aten.div.Tensor, aten.div.Scalar)
SCALINGS: Family = (aten.mul.Tensor, aten.mul.Scalar, *DIVISIONS)
RESIDUAL_SUMS: Family = (aten.add.Tensor, aten.sub.Tensor)
"""What ends a residual branch."""
COMPARISONS_WITH_NUMBER: Family = (
    aten.eq.Scalar,
    aten.ne.Scalar,
    aten.ge.Scalar,
    aten.gt.Scalar,
    aten.le.Scalar,
    aten.lt.Scalar,
)
CHOICES: Family = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
MASKED_FILLS: Family = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
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
    *MASKED_FILLS,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.pow.Tensor_Tensor,
    aten.complex.default,
    aten.polar.default,
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
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.ge.Tensor,
    aten.le.Tensor,
    aten.eq.Tensor,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_not.default,
    aten.logical_and.default,
    aten.logical_not.default,
    aten.neg.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.expand.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.unsqueeze.default,
    *PERMUTATIONS,
    aten.to.dtype,
    aten.masked_fill.Scalar,
)
"""Operators that masks are built with. Their result for one image is their result for each."""
