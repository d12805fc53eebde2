"""The gradients of a sampled weight and of its KL: a pass over (mu, rho) and dL/dW, built like `sample`'s."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.bias import store_bias_gradients, sum_over_batch
from fusedbayes.kernels.config import TileConfig
from fusedbayes.kernels.gaussian import gaussian_gradients, sigma_from_rho
from fusedbayes.kernels.launch import (
    NOT_SPECIALIZED,
    Parameter,
    bias_noise,
)
from fusedbayes.kernels.noise import Noise, load_key
from fusedbayes.kernels.parameter import Gradients, gaussian, new_gradients, open_prior
from fusedbayes.kernels.quads import load_quads, normal_quads, quad_columns, store_quads
from fusedbayes.kernels.sample import NO_BIAS, constants, programs_of, row_tile
from fusedbayes.kernels.select import select_tile_config


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _sample_weight_backward_kernel(
    grads,  # `Gradients` (N, K) row-major
    bias_grads,  # `Gradients` (N,), used if there is a bias
    grad_weight_ptr,  # (N, K) row-major, what the output says of mu; or None: only the KL was used
    grad_second_ptr,  # (N, K) row-major, in its place for sigma; unless ESTIMATOR is "shared"
    grad_y_ptr,  # (M, N), the bias's share of the gradient, or None
    second_grad_ptr,  # (M, N), in its place for sigma if ESTIMATOR is "local"
    grad_kl_ptr,  # () fp32, or None: only the sample was used
    weight,  # a `Gaussian` (N, K)
    bias,  # a `Gaussian` (N,), perhaps of None
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    M,
    N,
    K,
    stride_gm,
    stride_gn,
    row_offset,
    quad_offset,
    stream,
    bias_row,
    bias_column,
    bias_stream,
    COLUMN_SHIFT: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,  # 4 divides K, and COLUMN_SHIFT is 0
    EVEN: tl.constexpr,  # BLOCK_K divides K, and COLUMN_SHIFT is 0
    ESTIMATOR: tl.constexpr,
    ADD: tl.constexpr,  # to the gradients that are there
    BIAS_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dmu and drho of `gaussian_gradients`, for dL/dW = G and, for sigma, H (of "shared" G again).

    What the output says of mu is G, of sigma H eps with eps drawn again, or 2 sigma H for "local". Those of the bias
    are sums over the batch.

    Grid: as for `_sample_weight_kernel`.
    """
    if WHOLE_QUADS:
        K = K // 4 * 4  # for the compiler to see
    tile, tiles = tl.program_id(0), tl.cdiv(N, BLOCK_N) * tl.cdiv(K + COLUMN_SHIFT, BLOCK_K)
    seed, sample = 0, 0
    if seed_ptr is not None:
        seed, sample = load_key(seed_ptr, sample_ptr)
    if tile < tiles:
        begin, end, column, quads = row_tile(tile, N, K, quad_offset, COLUMN_SHIFT, BLOCK_N, BLOCK_K)
        columns, exist = quad_columns(column, K, COLUMN_SHIFT, WHOLE_QUADS, EVEN, BLOCK_K)
        start = begin.to(tl.int64) * K + column
        mu_row, rho_row = weight.mu + start, weight.rho + start
        grad_mu_row, grad_rho_row = grads.mu + start, grads.rho + start
        if grad_weight_ptr is not None:
            grad_weight_row = grad_weight_ptr + start
            if ESTIMATOR != "shared":
                grad_second_row = grad_second_ptr + start
        grad_kl, prior_mu, prior_sigma = 0.0, 0.0, 1.0
        if grad_kl_ptr is not None:
            grad_kl = tl.load(grad_kl_ptr)
            prior_mu, prior_sigma = open_prior(weight, start)
        for row in range(begin, end):
            mu = load_quads(mu_row, columns, exist, 0.0, WHOLE_QUADS)
            rho = load_quads(rho_row, columns, exist, 0.0, WHOLE_QUADS)
            grad_mu = tl.zeros((BLOCK_K // 4, 4), tl.float32)
            grad_sigma = grad_mu
            if grad_weight_ptr is not None:
                grad_mu = load_quads(grad_weight_row, columns, exist, 0.0, WHOLE_QUADS)
                grad_weight_row += K
                grad_sigma = grad_mu
                if ESTIMATOR != "shared":
                    grad_sigma = load_quads(grad_second_row, columns, exist, 0.0, WHOLE_QUADS)
                    grad_second_row += K
                if ESTIMATOR == "local":
                    grad_sigma *= 2.0 * sigma_from_rho(rho)
                else:
                    grad_sigma *= normal_quads(seed, quads, row_offset + row, sample, stream)
            m0, s0 = prior_mu, prior_sigma
            if grad_kl_ptr is not None:
                if not weight.PRIOR_MU_SCALAR:
                    m0 = load_quads(prior_mu, columns, exist, 0.0, WHOLE_QUADS)
                    prior_mu += K
                if not weight.PRIOR_SIGMA_SCALAR:
                    s0 = load_quads(prior_sigma, columns, exist, 1.0, WHOLE_QUADS)
                    prior_sigma += K
            WITH_KL: tl.constexpr = grad_kl_ptr is not None
            grad_mu, grad_rho = gaussian_gradients(grad_mu, grad_sigma, grad_kl, mu, rho, m0, s0, WITH_KL)
            if ADD:
                grad_mu += load_quads(grad_mu_row, columns, exist, 0.0, WHOLE_QUADS)
                grad_rho += load_quads(grad_rho_row, columns, exist, 0.0, WHOLE_QUADS)
            store_quads(grad_mu_row, columns, grad_mu, exist, WHOLE_QUADS)
            store_quads(grad_rho_row, columns, grad_rho, exist, WHOLE_QUADS)
            mu_row += K
            rho_row += K
            grad_mu_row += K
            grad_rho_row += K
    elif bias.mu is not None:
        outputs = (tile - tiles) * BIAS_BLOCK + tl.arange(0, BIAS_BLOCK)
        noise = Noise(seed, bias_row, tl.cast(bias_column, tl.int64) + outputs, sample, bias_stream)
        sums = sum_over_batch(grad_y_ptr, second_grad_ptr, noise, 1, M, N, stride_gm, stride_gn, outputs, ESTIMATOR)
        store_bias_gradients(bias_grads, sums, grad_kl_ptr, bias, outputs, N, ESTIMATOR, ADD)


def sample_layer_backward(
    grads: tuple[Gradients, Gradients],
    grad_weights: tuple[Tensor | None, Tensor | None],
    grad_ys: tuple[Tensor | None, Tensor | None],
    grad_kl: Tensor | None,
    weight: Parameter,
    bias: Sequence[Tensor | None],
    key: tuple[Tensor | None, Tensor | None],
    addresses: tuple[Sequence[int], Sequence[int]],
    estimator: str = "shared",
    add: bool = False,
    config: TileConfig | None = None,
) -> None:
    """dmu and drho of the weight and of the bias, in one launch.

    Args:
        grads: of the weight and of the bias: where they go.
        grad_weights: dL/dW (N, K) for mu, and in its place for sigma; None if only the KL was used.
        grad_ys: (M, N), likewise for the bias, whose gradient is the sum over the M rows; of the same strides.
        add: to the gradients that are there, instead of writing over them.
    """
    mu, with_bias, grad_y = weight[0], bias[0] is not None, grad_ys[0]
    config = config or select_tile_config(mu.shape)
    programs = programs_of(mu.shape, addresses[0], config, with_bias)
    stream, row_offset, column_offset = addresses[0]
    if programs > 0:
        _sample_weight_backward_kernel[(programs,)](
            *grads,
            *(None if grad is None else grad.contiguous() for grad in grad_weights),
            *grad_ys,
            grad_kl,
            gaussian(weight),
            gaussian(bias),
            *key,
            0 if grad_y is None else grad_y.shape[0],
            *mu.shape,
            *((0, 0) if grad_y is None else grad_y.stride()),
            row_offset,
            column_offset // 4,
            stream,
            *bias_noise(addresses[1]),
            ESTIMATOR=estimator,
            ADD=add,
            **constants(mu.shape, addresses[0], config),
        )


def sample_weight_backward(
    grad_weight: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    rho: Tensor,
    prior_mu: Tensor | None,
    prior_sigma: Tensor | None,
    seed: Tensor | None,
    sample: Tensor | None,
    address: Sequence[int],
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """dmu and drho; see the operator of this name."""
    parameter, key = (mu, rho, prior_mu, prior_sigma), (seed, sample)
    grads = new_gradients(parameter, mu)
    grad_weights, addresses = (grad_weight, None), (address, address)
    sample_layer_backward(
        (grads, grads), grad_weights, (None, None), grad_kl, parameter, NO_BIAS, key, addresses, config=config
    )
    return grads
