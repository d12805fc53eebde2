"""Gradients of the operators, each from registered operators alone, so that torch.compile can trace them.

A backward pass that is itself to be differentiated (``create_graph=True``, torch.func) goes through the PyTorch
implementation instead, whose operations autograd knows: slower, with the noise in memory, but right to any order.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedbayes.ops import cpu, eager

DIFFERENTIABLE = ("sample_weight", "weight_kl", "scale_mixture_kl", "bayes_linear")


def _call(name: str, *arguments: Any) -> Any:
    operator = cpu.direct(name, arguments) or getattr(torch.ops.fusedbayes, name).default
    return operator(*arguments)


def _below_autograd(name: str, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return _call(name, *arguments)


def _dispatch(function: type["_Operator"], *arguments: Any) -> Any:
    needs_grad = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    return function.apply(*arguments) if needs_grad else _below_autograd(function.name, *arguments)


class _Operator(torch.autograd.Function):
    """Keeps the operator's arguments, and of what it computed no more than it must, for the backward pass.

    Without setup_context, which torch.func would need but never comes here for (see `ops._entry`): with it, torch
    inspects the signature of forward at each call, for longer than a small layer takes.
    """

    name: ClassVar[str]

    @staticmethod
    def run(ctx: Any, name: str, arguments: tuple[Any, ...], num_tensors: int, kept: tuple[int, ...] = ()) -> Any:
        """Calls the operator; keeps its arguments, which begin with so many tensors, and some of its results."""
        ctx.set_materialize_grads(False)
        ctx.rest = arguments[num_tensors:]
        results = _below_autograd(name, *arguments)
        ctx.save_for_backward(*arguments[:num_tensors], *(results[index] for index in kept))
        return results

    @staticmethod
    def differentiable_backward(ctx: Any, name: str, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients as functions that autograd can differentiate again."""
        # Views of the inputs: where one input was computed from another, its gradient must not flow on into that one.
        given = ctx.saved_tensors[: len(ctx.needs_input_grad) - len(ctx.rest)]
        saved = [None if tensor is None else tensor.view_as(tensor) for tensor in given]
        arguments = (*saved, *ctx.rest)
        outputs = getattr(eager, name)(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        wanted = [argument for argument, needed in zip(arguments, ctx.needs_input_grad, strict=True) if needed]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        values, cotangents = zip(*used, strict=True)
        grads = iter(torch.autograd.grad(values, wanted, cotangents, create_graph=True, allow_unused=True))
        return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)


def _check_still(shape: Sequence[int], **parameters: Tensor | None) -> None:
    """Raises RuntimeError unless the parameters have this shape, as they had in the forward pass.

    Whoever assigns their ``.data`` or unpacks them otherwise can change that unseen; a kernel would write anywhere.
    """
    for name, tensor in parameters.items():
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(
                f"{name} has changed its shape since the forward pass: expected {tuple(shape)}, got "
                f"{tuple(tensor.shape)}"
            )


def _saved(ctx: Any, shape: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """What was kept, mu and rho first, unpacked once: a checkpoint gives it once. Of this shape, or of mu's both."""
    mu, rho, *rest = ctx.saved_tensors
    _check_still(mu.shape if shape is None else shape, mu=mu, rho=rho)
    return mu, rho, *rest


class _SampleWeight(_Operator):
    name = "sample_weight"

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        weight, kl = _Operator.run(ctx, _SampleWeight.name, arguments, 6)
        if not arguments[-1]:
            ctx.mark_non_differentiable(kl)
        return weight, kl

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor | None, grad_kl: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            return _Operator.differentiable_backward(ctx, _SampleWeight.name, grad_weight, grad_kl)
        address, *_ = ctx.rest
        saved = _saved(ctx, None if grad_weight is None else grad_weight.shape)
        grads = _call("sample_weight_backward", grad_weight, grad_kl, *saved, address)
        return *grads, *[None] * 7


class _WeightKL(_Operator):
    name = "weight_kl"

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _Operator.run(ctx, _WeightKL.name, arguments, 4)

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> Any:
        if torch.is_grad_enabled():
            return _Operator.differentiable_backward(ctx, _WeightKL.name, grad_kl)
        noise = (None, None, (0, 0, 0))
        grads = _call("sample_weight_backward", None, grad_kl, *_saved(ctx), *noise)
        return *grads, None, None


class _ScaleMixtureKL(_Operator):
    name = "scale_mixture_kl"

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _Operator.run(ctx, _ScaleMixtureKL.name, arguments, 7)

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            return _Operator.differentiable_backward(ctx, _ScaleMixtureKL.name, grad_kl)
        if grad_kl is None:
            return (None,) * 8
        grads = _call("scale_mixture_kl_backward", grad_kl, *_saved(ctx), *ctx.rest)
        return *grads, *[None] * 6


class _BayesLinear(_Operator):
    name = "bayes_linear"

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        y, kl, slope = _Operator.run(ctx, _BayesLinear.name, arguments, 11, kept=(2,))
        ctx.mark_non_differentiable(*(slope,) if arguments[-1] else (kl, slope))
        return y, kl, slope

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_kl: Tensor | None, _: None) -> Any:
        if torch.is_grad_enabled():
            return _Operator.differentiable_backward(ctx, _BayesLinear.name, grad_y, grad_kl, None)
        x, *parameters, seed, sample, slope = ctx.saved_tensors
        weight, bias = parameters[:4], parameters[4:]
        *addresses, num_samples, same_input, estimator, _ = ctx.rest
        needs_x, *needed = ctx.needs_input_grad
        needs_weight, needs_bias = needed[0] or needed[1], needed[4] or needed[5]
        shape = weight[0].shape if grad_y is None else (grad_y.shape[1], x.shape[1])
        _check_still(shape, weight_mu=weight[0], weight_rho=weight[1])
        _check_still(shape[:1], bias_mu=bias[0], bias_rho=bias[1])
        if grad_y is None:
            grads = *_kl_gradients(grad_kl, weight, needs_weight), *_kl_gradients(grad_kl, bias, needs_bias)
            return None, *grads, *[None] * 8
        # A bias comes along with the weight.
        bias_or_none = bias if needs_bias else (None,) * 4
        grad_x, *grads = _call(
            "bayes_linear_backward",
            *(grad_y, grad_kl, slope, x.repeat(num_samples, 1) if same_input else x),
            *(*weight, *bias_or_none, seed, sample),
            *(*addresses, num_samples, estimator, needs_x, needs_weight or needs_bias),
        )
        grad_weights, grad_biases = (grads[:2], grads[2:])
        if same_input and needs_x:
            grad_x = grad_x.view(num_samples, *x.shape).sum(0)
        return (
            grad_x if needs_x else None,
            *(grad_weights if needs_weight else (None, None)),
            *(None, None),
            *(grad_biases if needs_bias else (None, None)),
            *[None] * 10,
        )


def _kl_gradients(
    grad_kl: Tensor | None, parameter: Sequence[Tensor | None], needed: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of mu, rho and the prior where the output has none."""
    if not needed:
        return (None,) * 4
    rows = [t if t is None or t.dim() != 1 else t[None] for t in parameter]
    grads = _call("sample_weight_backward", None, grad_kl, *rows, None, None, (0, 0, 0))
    return *(grad.view_as(parameter[0]) for grad in grads), None, None


def sample_weight(*arguments: Any) -> Any:
    return _dispatch(_SampleWeight, *arguments)


def weight_kl(*arguments: Any) -> Any:
    return _dispatch(_WeightKL, *arguments)


def scale_mixture_kl(*arguments: Any) -> Any:
    return _dispatch(_ScaleMixtureKL, *arguments)


def bayes_linear(*arguments: Any) -> Any:
    return _dispatch(_BayesLinear, *arguments)
