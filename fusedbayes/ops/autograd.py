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


def _dispatch(function: type["_Operator"], *arguments: Any) -> Any:
    served = cpu.served(arguments)
    if not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)):
        return _below_autograd(function.name, served, arguments)
    if served is None:
        return function.apply(None, *arguments)
    # Without the search of torch.autograd.Function.apply for tensors that a transform of torch.func has left behind,
    # which takes as long as the whole rest of it: these arguments are none.
    return super(torch.autograd.Function, function).apply(served, *arguments)  # type: ignore[misc]


def _below_autograd(name: str, served: bool | None, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return cpu.direct(name, served)(*arguments)


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _check_form(name: str, tensor: Tensor, form: tuple[torch.Size, torch.dtype, torch.device]) -> None:
    """Raises RuntimeError unless the tensor is of this form still."""
    if _form(tensor) == form:
        return
    for what, then, now in zip(("shape", "dtype", "device"), form, _form(tensor), strict=True):
        if then != now:
            then, now = (tuple(value) if isinstance(value, torch.Size) else value for value in (then, now))
            raise RuntimeError(f"{name} has changed its {what} since the forward pass: expected {then}, got {now}")


class _Operator(torch.autograd.Function):
    """Keeps the operator's arguments, and of what it computed no more than it must, for the backward pass.

    Without setup_context, which torch.func would need but never comes here for (see `ops._entry`): with it, torch
    inspects the signature of forward at each call, for longer than a small layer takes.

    The first argument is what `cpu.served` said of the others.
    """

    name: ClassVar[str]
    checked: ClassVar[dict[str, int]] = {"mu": 0, "rho": 1}  # which arguments `unpack` looks at again, by name

    @classmethod
    def run(
        cls, ctx: Any, served: bool | None, arguments: tuple[Any, ...], num_tensors: int, kept: tuple[int, ...] = ()
    ) -> Any:
        """Calls the operator; keeps its arguments, which begin with so many tensors, and some of its results."""
        ctx.set_materialize_grads(False)
        ctx.served, ctx.rest = served, arguments[num_tensors:]
        ctx.identities = tuple(map(id, arguments[:num_tensors]))
        ctx.forms = [(name, i, _form(arguments[i])) for name, i in cls.checked.items() if arguments[i] is not None]
        results = _below_autograd(cls.name, served, arguments)
        ctx.save_for_backward(*arguments[:num_tensors], *(results[index] for index in kept))
        return results

    @staticmethod
    def unpack(ctx: Any) -> tuple[Any, ...]:
        """What was kept: once, since a checkpoint gives it once.

        Raises:
            RuntimeError: a tensor has changed. Whoever assigns its ``.data`` or unpacks it otherwise can do that
                unseen; a kernel would write anywhere.
        """
        saved = ctx.saved_tensors
        # Hooks may unpack other tensors, of whatever kind, and the same one may hold a negation now that is put off.
        others = tuple(map(id, saved[: len(ctx.identities)])) != ctx.identities
        for name, index, form in ctx.forms:
            _check_form(name, saved[index], form)
            others = others or saved[index].is_neg()
        if others:
            ctx.served = None
        return saved

    @staticmethod
    def gradients(ctx: Any, name: str, grad_outputs: tuple[Tensor | None, ...], *arguments: Any) -> Any:
        """Calls operator `name` with the outputs' gradients and then these arguments, which were kept."""
        if ctx.served is None:
            served = cpu.served((*grad_outputs, *arguments))
        else:
            served = cpu.served(grad_outputs)
            if served:
                served = ctx.served
        return cpu.direct(name, served)(*grad_outputs, *arguments)

    @classmethod
    def differentiable_backward(cls, ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients as functions that autograd can differentiate again."""
        _, *needs_input_grad = ctx.needs_input_grad
        # Views of the inputs: where one input was computed from another, its gradient must not flow on into that one.
        given = ctx.saved_tensors[: len(needs_input_grad) - len(ctx.rest)]
        saved = [None if tensor is None else tensor.view_as(tensor) for tensor in given]
        arguments = (*saved, *ctx.rest)
        outputs = getattr(eager, cls.name)(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        wanted = [argument for argument, needed in zip(arguments, needs_input_grad, strict=True) if needed]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        values, cotangents = zip(*used, strict=True)
        grads = iter(torch.autograd.grad(values, wanted, cotangents, create_graph=True, allow_unused=True))
        return None, *(next(grads) if needed else None for needed in needs_input_grad)


class _SampleWeight(_Operator):
    name = "sample_weight"
    checked: ClassVar[dict[str, int]] = {**_Operator.checked, "seed": 4, "sample": 5}

    @staticmethod
    def forward(ctx: Any, served: bool | None, *arguments: Any) -> Any:
        weight, kl = _SampleWeight.run(ctx, served, arguments, 6)
        if not arguments[-1]:
            ctx.mark_non_differentiable(kl)
        return weight, kl

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor | None, grad_kl: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            return _SampleWeight.differentiable_backward(ctx, grad_weight, grad_kl)
        address, *_ = ctx.rest
        given = (grad_weight, grad_kl)
        grads = _Operator.gradients(ctx, "sample_weight_backward", given, *_Operator.unpack(ctx), address)
        return None, *grads, *[None] * 7


class _WeightKL(_Operator):
    name = "weight_kl"

    @staticmethod
    def forward(ctx: Any, served: bool | None, *arguments: Any) -> Any:
        return _WeightKL.run(ctx, served, arguments, 4)

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> Any:
        if torch.is_grad_enabled():
            return _WeightKL.differentiable_backward(ctx, grad_kl)
        noise = (None, None, (0, 0, 0))
        grads = _Operator.gradients(ctx, "sample_weight_backward", (None, grad_kl), *_Operator.unpack(ctx), *noise)
        return None, *grads, None, None


class _ScaleMixtureKL(_Operator):
    name = "scale_mixture_kl"
    checked: ClassVar[dict[str, int]] = {**_Operator.checked, "seed": 5, "sample": 6}

    @staticmethod
    def forward(ctx: Any, served: bool | None, *arguments: Any) -> Any:
        return _ScaleMixtureKL.run(ctx, served, arguments, 7)

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            return _ScaleMixtureKL.differentiable_backward(ctx, grad_kl)
        if grad_kl is None:
            return (None,) * 9
        grads = _Operator.gradients(ctx, "scale_mixture_kl_backward", (grad_kl,), *_Operator.unpack(ctx), *ctx.rest)
        return None, *grads, *[None] * 6


class _BayesLinear(_Operator):
    name = "bayes_linear"
    checked: ClassVar[dict[str, int]] = {
        "x": 0,
        "weight_mu": 1,
        "weight_rho": 2,
        "bias_mu": 5,
        "bias_rho": 6,
        "seed": 9,
        "sample": 10,
    }

    @staticmethod
    def forward(ctx: Any, served: bool | None, *arguments: Any) -> Any:
        y, kl, slope = _BayesLinear.run(ctx, served, arguments, 11, kept=(2,))
        ctx.mark_non_differentiable(*(slope,) if arguments[-1] else (kl, slope))
        return y, kl, slope

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_kl: Tensor | None, _: None) -> Any:
        if torch.is_grad_enabled():
            return _BayesLinear.differentiable_backward(ctx, grad_y, grad_kl, None)
        x, *parameters, seed, sample, slope = _Operator.unpack(ctx)
        weight, bias = parameters[:4], parameters[4:]
        *addresses, num_samples, same_input, estimator, _ = ctx.rest
        _, needs_x, *needed = ctx.needs_input_grad
        needs_weight, needs_bias = needed[0] or needed[1], needed[4] or needed[5]
        if grad_y is None:
            of_weight = _kl_gradients(ctx, grad_kl, weight, needs_weight)
            return None, None, *of_weight, *_kl_gradients(ctx, grad_kl, bias, needs_bias), *[None] * 8
        # A bias comes along with the weight.
        bias_or_none = bias if needs_bias else (None,) * 4
        kept = slope, x.repeat(num_samples, 1) if same_input else x, *weight, *bias_or_none, seed, sample
        how = *addresses, num_samples, estimator, needs_x, needs_weight or needs_bias
        grad_x, *grads = _Operator.gradients(ctx, "bayes_linear_backward", (grad_y, grad_kl), *kept, *how)
        grad_weights, grad_biases = (grads[:2], grads[2:])
        if same_input and needs_x:
            grad_x = grad_x.view(num_samples, *x.shape).sum(0)
        return (
            None,
            grad_x if needs_x else None,
            *(grad_weights if needs_weight else (None, None)),
            *(None, None),
            *(grad_biases if needs_bias else (None, None)),
            *[None] * 10,
        )


def _kl_gradients(
    ctx: Any, grad_kl: Tensor | None, parameter: Sequence[Tensor | None], needed: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of mu, rho and the prior where the output has none."""
    if not needed:
        return (None,) * 4
    rows = [t if t is None or t.dim() != 1 else t[None] for t in parameter]
    noise = (None, None, (0, 0, 0))
    grads = _Operator.gradients(ctx, "sample_weight_backward", (None, grad_kl), *rows, *noise)
    return *(grad.view_as(parameter[0]) for grad in grads), None, None


def sample_weight(*arguments: Any) -> Any:
    return _dispatch(_SampleWeight, *arguments)


def weight_kl(*arguments: Any) -> Any:
    return _dispatch(_WeightKL, *arguments)


def scale_mixture_kl(*arguments: Any) -> Any:
    return _dispatch(_ScaleMixtureKL, *arguments)


def bayes_linear(*arguments: Any) -> Any:
    return _dispatch(_BayesLinear, *arguments)
