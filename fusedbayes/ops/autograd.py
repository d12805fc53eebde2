"""Gradients of the operators, each from registered operators alone, so that torch.compile can trace them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedbayes.reference import compute_dtype

DIFFERENTIABLE = ("sample_weight", "weight_kl", "bayes_linear")


def _below_autograd(name: str, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.fusedbayes, name).default(*arguments)


def _dispatch(name: str, function: type[torch.autograd.Function], *arguments: Any) -> Any:
    needs_grad = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    return function.apply(*arguments) if needs_grad else _below_autograd(name, *arguments)


class _SampleWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        rho: Tensor,
        prior_mu: Tensor | None,
        prior_sigma: Tensor | None,
        seed: Tensor,
        address: Sequence[int],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        weight, kl = _below_autograd("sample_weight", mu, rho, prior_mu, prior_sigma, seed, address, dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mu, rho, prior_mu, prior_sigma, seed)
        ctx.address = address
        if prior_mu is None:
            ctx.mark_non_differentiable(kl)
        return weight, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor | None, grad_kl: Tensor | None) -> Any:
        mu, rho, prior_mu, prior_sigma, seed = ctx.saved_tensors
        grads = torch.ops.fusedbayes.sample_weight_backward.default(
            grad_weight, grad_kl, mu, rho, prior_mu, prior_sigma, seed, ctx.address
        )
        return *grads, None, None, None, None, None


class _WeightKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> Any:
        ctx.save_for_backward(mu, rho, prior_mu, prior_sigma)
        return _below_autograd("weight_kl", mu, rho, prior_mu, prior_sigma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> Any:
        mu, rho, prior_mu, prior_sigma = ctx.saved_tensors
        grads = torch.ops.fusedbayes.sample_weight_backward.default(
            None, grad_kl, mu, rho, prior_mu, prior_sigma, None, (0, 0, 0, 0)
        )
        return *grads, None, None


class _BayesLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_mu: Tensor,
        weight_rho: Tensor,
        weight_prior_mu: Tensor | None,
        weight_prior_sigma: Tensor | None,
        bias_mu: Tensor | None,
        bias_rho: Tensor | None,
        bias_prior_mu: Tensor | None,
        bias_prior_sigma: Tensor | None,
        seed: Tensor,
        weight_address: Sequence[int],
        bias_address: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        weight = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
        bias = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
        y, kl = _below_autograd("bayes_linear", x, *weight, *bias, seed, weight_address, bias_address)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weight, *bias, seed)
        ctx.addresses = weight_address, bias_address
        if weight_prior_mu is None:
            ctx.mark_non_differentiable(kl)
        return y, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_kl: Tensor | None) -> Any:
        ops = torch.ops.fusedbayes
        x, *parameters, seed = ctx.saved_tensors
        weight, bias = parameters[:4], parameters[4:]
        weight_address, bias_address = ctx.addresses
        needs_x, needs_weight, needs_bias = (any(ctx.needs_input_grad[i:j]) for i, j in ((0, 1), (1, 3), (5, 7)))
        grad_x = grad_bias = None
        grad_weights: tuple[Tensor | None, Tensor | None] = (None, None)
        grad_biases: tuple[Tensor | None, Tensor | None] = (None, None)
        if grad_y is not None and needs_x:
            grad_x = ops.bayes_linear_backward_input.default(grad_y, *weight[:2], seed, weight_address)
        if needs_weight and grad_y is not None:
            grad_weights = ops.bayes_linear_backward_weight.default(grad_y, grad_kl, x, *weight, seed, weight_address)
        elif needs_weight:
            grad_weights = ops.sample_weight_backward.default(None, grad_kl, *weight, None, weight_address)
        if needs_bias:
            if grad_y is not None:
                grad_bias = grad_y.sum(0, keepdim=True, dtype=compute_dtype(grad_y))
            rows = [t if t is None or t.dim() == 0 else t[None] for t in bias]
            grad_rows = ops.sample_weight_backward.default(grad_bias, grad_kl, *rows, seed, bias_address)
            grad_biases = grad_rows[0][0], grad_rows[1][0]
        return grad_x, *grad_weights, None, None, *grad_biases, None, None, None, None, None


def sample_weight(*arguments: Any) -> Any:
    return _dispatch("sample_weight", _SampleWeight, *arguments)


def weight_kl(*arguments: Any) -> Any:
    return _dispatch("weight_kl", _WeightKL, *arguments)


def bayes_linear(*arguments: Any) -> Any:
    return _dispatch("bayes_linear", _BayesLinear, *arguments)
