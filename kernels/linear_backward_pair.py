"""dmu and drho where mu and sigma have products of their own, or the noise of several Monte Carlo samples."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.bias import store_bias_gradients, sum_over_batch
from fusedbayes.kernels.config import MatmulConfig
from fusedbayes.kernels.launch import NOT_SPECIALIZED, Parameter, bias_noise, dot_options, whole_quads, with_near_rows
from fusedbayes.kernels.noise import Noise, load_key, normal_tile
from fusedbayes.kernels.parameter import Gradients, gaussian, new_gradients
from fusedbayes.kernels.second_operands import Operands
from fusedbayes.kernels.weight_tile import BatchTiles, WeightTile, batch_step, piece_noise, quarters, store_tile


@triton.jit
def _step(products, tile_m, first, second, MASKED: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of batch rows of one product, or of two."""
    sums = (batch_step(products[0], tile_m, first, MASKED, DOT_DTYPE, PRECISION),)
    if len(products) == 2:
        sums += (batch_step(products[1], tile_m, second, MASKED, DOT_DTYPE, PRECISION),)
    return sums


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_backward_pair_kernel(
    grads,  # `Gradients` (N, K) row-major
    bias_grads,  # `Gradients` (N,), used if there is a bias
    grad_y_ptr,  # (num_samples, M, N)
    second_grad_ptr,  # likewise, of the second product
    bias_grad_ptr,  # (num_samples, bias_M, N): dY, or for a long batch its sums
    second_bias_grad_ptr,  # likewise
    grad_kl_ptr,  # () fp32, or None
    x_ptr,  # (num_samples, M, K)
    second_x_ptr,  # likewise, of the second product
    weight,  # a `Gaussian` (N, K)
    bias,  # a `Gaussian` (N,), perhaps of None
    seed_ptr,  # () int64, or None for "local"
    sample_ptr,  # () int64, or None for 0
    num_samples,
    M,
    bias_M,
    N,
    K,
    stride_gm,
    stride_gn,
    stride_bm,
    stride_bn,
    stride_xm,
    stride_xk,
    row_offset,
    quad_offset,
    stream,
    bias_row,
    bias_column,
    bias_stream,
    EVEN_M: tl.constexpr,  # BLOCK_M divides M
    GRAD_QUADS: tl.constexpr,  # grad_y has whole quads of adjacent columns
    X_QUADS: tl.constexpr,  # x has, too
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    SAMPLES: tl.constexpr,  # num_samples is more than 1
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """G = dY^T x and H = dY'^T x' for the second operands dY' and x', then dmu and drho of `gaussian_gradients`.

    What the output says of mu is the sum of G over the Monte Carlo samples. Of sigma it is the sum of G eps for
    "shared", of H eps for "flipout", with the eps of each sample, and 2 sigma H for "local", whose samples are one.

    Grid: as for `_linear_backward_weight_kernel`; and as there 4 divides K and the shard's first column.
    """
    K = K // 4 * 4  # for the compiler to see
    if GRAD_QUADS:
        stride_gm = stride_gm // 4 * 4
    if X_QUADS:
        stride_xm = stride_xm // 4 * 4
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile_n, tile_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    # Tiles that would stick out move back; what they share with their neighbours both compute and write alike.
    first_row, first_column = tl.minimum(tile_n * BLOCK_N, N - BLOCK_N), tl.minimum(tile_k * BLOCK_K, K - BLOCK_K)
    in_tile, batch = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    rows = first_row + in_tile
    grad_y_offsets = batch[None, :] * stride_gm + in_tile[:, None] * stride_gn
    x_offsets = batch[:, None] * stride_xm + tl.arange(0, BLOCK_K)[None, :] * stride_xk
    seed, sample = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    if seed_ptr is not None:
        seed, sample = load_key(seed_ptr, sample_ptr)

    PIECE: tl.constexpr = BLOCK_K // 4
    start = first_row.to(tl.int64) * K + first_column
    noise = Noise(seed, row_offset + rows, quad_offset + first_column // 4, sample, stream)
    tile = WeightTile(start, in_tile, noise, K)
    nothing = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    grad_mu = nothing
    grad_sigma = quarters(nothing)
    for index in range(num_samples):
        first_batch = tl.cast(index, tl.int64) * M
        grad_start = first_batch * stride_gm + first_row.to(tl.int64) * stride_gn
        x_start = first_batch * stride_xm + first_column.to(tl.int64) * stride_xk
        first = BatchTiles(grad_y_ptr + grad_start, grad_y_offsets, stride_gm, x_ptr + x_start, x_offsets, stride_xm, M)
        second = first
        products = (nothing,)
        if ESTIMATOR != "shared":
            second_grad, second_x = second_grad_ptr + grad_start, second_x_ptr + x_start
            second = BatchTiles(second_grad, grad_y_offsets, stride_gm, second_x, x_offsets, stride_xm, M)
            products = (grad_mu, nothing)
        for tile_m in range(M // BLOCK_M):
            products = _step(products, tile_m, first, second, False, DOT_DTYPE, INPUT_PRECISION)
        if not EVEN_M:
            products = _step(products, M // BLOCK_M, first, second, True, DOT_DTYPE, INPUT_PRECISION)
        pieces = quarters(products[len(products) - 1])
        if ESTIMATOR == "shared":
            grad_mu += products[0]
        else:
            grad_mu = products[0]
        if SAMPLES:
            drawn = WeightTile(start, in_tile, Noise(seed, noise.rows, noise.columns, sample + index, stream), K)
            sums = ()
            for i in tl.static_range(4):
                sums += (grad_sigma[i] + pieces[i] * normal_tile(*piece_noise(drawn, i, PIECE)),)
            grad_sigma = sums
        else:
            grad_sigma = pieces
    FACTOR: tl.constexpr = "2 sigma" if ESTIMATOR == "local" else ("1" if SAMPLES else "eps")
    store_tile(grads, quarters(grad_mu), grad_sigma, grad_kl_ptr, weight, tile, FACTOR)
    if bias.mu is not None:
        if tile_k == 0:
            outputs = Noise(seed, bias_row, tl.cast(bias_column, tl.int64) + rows, sample, bias_stream)
            of_bias = (bias_grad_ptr, second_bias_grad_ptr, outputs, num_samples, bias_M, N, stride_bm, stride_bn, rows)
            sums = sum_over_batch(*of_bias, ESTIMATOR)
            store_bias_gradients(bias_grads, sums, grad_kl_ptr, bias, rows, N, ESTIMATOR, False)


def pair_gradients(
    operands: Operands,
    bias_grads: tuple[Tensor, Tensor],
    grad_kl: Tensor | None,
    weight: Parameter,
    bias: Sequence[Tensor | None],
    key: tuple[Tensor, Tensor | None],
    addresses: tuple[Sequence[int], Sequence[int]],
    num_samples: int,
    estimator: str,
    config: MatmulConfig,
) -> tuple[Gradients, Gradients]:
    """dmu and drho of weight and bias; `bias_grads`, and for "local" the second, sum up to those of each sample."""
    grad_y, x, second_grad, second_x = operands
    if estimator == "shared":  # others are row-major
        grad_y = with_near_rows(grad_y, config.block_m, config.block_n)
        x = with_near_rows(x, config.block_m, config.block_k)
    (rows, N), K = grad_y.shape, x.shape[1]
    M = rows // num_samples
    stream, row_offset, column_offset = addresses[0]
    grads, grads_of_bias = new_gradients(weight, weight[0]), new_gradients(bias, weight[0])
    _linear_backward_pair_kernel[(triton.cdiv(N, config.block_n) * triton.cdiv(K, config.block_k),)](
        grads,
        grads_of_bias,
        grad_y,
        second_grad,
        *bias_grads,
        grad_kl,
        x,
        second_x,
        gaussian(weight),
        gaussian(bias),
        *((None, None) if estimator == "local" else key),
        num_samples,
        M,
        bias_grads[0].shape[0] // num_samples,
        N,
        K,
        *grad_y.stride(),
        *bias_grads[0].stride(),
        *x.stride(),
        row_offset,
        column_offset // 4,
        stream,
        *bias_noise(addresses[1]),
        EVEN_M=M % config.block_m == 0,
        GRAD_QUADS=whole_quads(grad_y.stride()),
        X_QUADS=whole_quads(x.stride()),
        **dot_options(x),
        ESTIMATOR=estimator,
        SAMPLES=num_samples > 1,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return grads, grads_of_bias
