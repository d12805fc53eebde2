"""The operators: registered as torch.library asks, with the gradients that autograd derives from the reference."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from problems import MIXTURE, PRIORS, Parameter, Problem, make_problem
from torch import Tensor

from fusedbayes import functional, reference
from fusedbayes.noise import Address, draw_seed
from fusedbayes.reference import Estimator, GaussianParameter

ops = torch.ops.fusedbayes

# Estimators and Monte Carlo samples beyond the usual.
CASES: tuple[tuple[Estimator, int], ...] = (("shared", 3), ("local", 1), ("local", 3), ("flipout", 1), ("flipout", 3))

# The arguments of each operator for a problem; what follows a colon tells the calls of one operator apart.
DIFFERENTIABLE: dict[str, Callable[[Problem], Sequence[Any]]] = {
    "sample_weight": lambda p: p.sample_weight(p.x.dtype),
    "weight_kl": lambda p: p.weight,
    "scale_mixture_kl": lambda p: p.scale_mixture_kl,
    "bayes_linear": lambda p: p.forward,
    # Three samples of one row each.
    "bayes_linear:local": lambda p: p._replace(estimator="local", num_samples=3).forward,
    "bayes_linear:flipout": lambda p: p._replace(estimator="flipout", num_samples=3).forward,
}
BACKWARD: dict[str, Callable[[Problem], Sequence[Any]]] = {
    "sample_weight_backward:both": lambda p: (p.weight[0], p.grad_kl, *p.weight, *p.noise),
    "sample_weight_backward:weight": lambda p: (p.weight[0], None, *p.weight, *p.noise),
    "sample_weight_backward:kl": lambda p: (None, p.grad_kl, *p.weight, None, None, p.weight_address),
    "scale_mixture_kl_backward": lambda p: p.scale_mixture_kl_backward,
    "bayes_linear_backward": lambda p: p.backward,
    "bayes_linear_backward:local": lambda p: (
        p._replace(estimator="local", num_samples=3, slope=torch.ones_like(p.grad_y)).backward
    ),
    "bayes_linear_backward:flipout": lambda p: p._replace(estimator="flipout", num_samples=3).backward,
    "bayes_linear_backward:input": lambda p: p.backward_input,
    "bayes_linear_backward:weight": lambda p: p.backward_weight,
}
NOISE: dict[str, Callable[[Problem], Sequence[Any]]] = {
    "normal": lambda p: (torch.tensor([4, 0, 4], device=p.x.device), 7, *p.noise, torch.float32),
    "signs": lambda p: (torch.tensor([4, 0, 4], device=p.x.device), 7, *p.noise, torch.float16),
    "normal:16-bit": lambda p: (torch.arange(12, device=p.x.device)[::3], 7, *p.noise, torch.bfloat16),
}
OPERATORS = DIFFERENTIABLE | BACKWARD | NOISE


def double_problem(shape: tuple[int, int, int] = (3, 5, 7), **options: Any) -> Problem:
    return make_problem(shape, dtype=torch.float64, parameter_dtype=torch.float64, **options)


def leaves(problem: Problem, names: Sequence[str]) -> dict[str, Tensor]:
    """Makes the named inputs of `problem` require grad: of x, weight_mu, weight_rho, bias_mu and bias_rho."""
    inputs = {"x": problem.x, "weight_mu": problem.weight[0], "weight_rho": problem.weight[1]}
    inputs |= {"bias_mu": problem.bias[0], "bias_rho": problem.bias[1]}
    return {name: tensor.requires_grad_() for name, tensor in inputs.items() if name in names and tensor is not None}


def priors_of(name: str) -> tuple[str, ...]:
    """Noise has none, the KL alone needs one, and the scale mixture is one of its own."""
    if name in NOISE or name.startswith("scale_mixture"):
        return PRIORS[:1]
    return PRIORS[1:] if name == "weight_kl" else PRIORS


ALL_INPUTS = ("x", "weight_mu", "weight_rho", "bias_mu", "bias_rho")


def test_every_operator_is_tested() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("fusedbayes::") for name in names if name.startswith("fusedbayes::")}
    assert registered == {name.split(":")[0] for name in OPERATORS}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", ["dense", "permuted"])
@pytest.mark.parametrize(
    ("name", "prior", "bias"),
    [
        *((name, prior, True) for name in OPERATORS for prior in priors_of(name)),
        *(("bayes_linear", prior, False) for prior in PRIORS),
    ],
)
def test_opcheck(name: str, prior: str, bias: bool, layout: str, device: str) -> None:
    problem = make_problem((3, 5, 7), prior=prior, bias=bias).to(device)
    if layout == "permuted":
        problem = problem.map(lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor)
    if name in DIFFERENTIABLE:
        leaves(problem, ALL_INPUTS)
    torch.library.opcheck(getattr(ops, name.split(":")[0]).default, OPERATORS[name](problem))


def reference_kl(*parameters: Parameter) -> Tensor:
    given = [parameter for parameter in parameters if parameter[0] is not None]
    return sum(reference.weight_kl(GaussianParameter(*parameter)) for parameter in given)


def reference_noise(problem: Problem) -> tuple[Tensor, Tensor | int, Address]:
    return problem.seed, 0 if problem.sample is None else problem.sample, problem.weight_address


def reference_results(problem: Problem) -> tuple[Tensor, Tensor | None]:
    y = reference.bayes_linear(
        problem.x,
        *problem.weight[:2],
        *problem.bias[:2],
        *reference_noise(problem),
        problem.bias_address,
        num_samples=problem.num_samples,
        estimator=problem.estimator,
    )
    return y, reference_kl(problem.weight, problem.bias) if problem.with_kl else None


def check_gradients(problem: Problem, used: str, needed: Sequence[str]) -> None:
    """Compares values and gradients of the operator with the reference's, of a loss that uses y, the KL or both."""
    inputs = leaves(problem, needed)

    def run(y: Tensor, kl: Tensor | None) -> list[Tensor | None]:
        loss = (y * problem.grad_y).sum() if used == "y" else kl * problem.grad_kl
        if used == "both":
            loss = loss + (y * problem.grad_y).sum()
        gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        return [loss.detach(), *gradients]

    expected = run(*reference_results(problem))
    for name, actual, exact in zip(
        ("loss", *inputs), run(*ops.bayes_linear(*problem.forward)[:2]), expected, strict=True
    ):
        # Sums of at most 40 terms of order ten in double precision.
        torch.testing.assert_close(actual, exact, rtol=1e-13, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 5, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("prior", "used"), [("none", "y"), *((prior, used) for prior in PRIORS[1:] for used in ("y", "kl", "both"))]
)
def test_gradients_are_those_of_the_reference(prior: str, used: str, bias: bool, shape: tuple[int, int, int]) -> None:
    addresses = {"weight_address": Address(8, 2, 3), "bias_address": Address(9, column_offset=2)}
    needed = ALL_INPUTS[1:] if used == "kl" else ALL_INPUTS
    check_gradients(double_problem(shape, prior=prior, bias=bias, **addresses), used, needed)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("used", ["y", "kl", "both"])
@pytest.mark.parametrize(("estimator", "num_samples"), CASES)
def test_gradients_of_estimators_and_samples_are_those_of_the_reference(
    estimator: Estimator, num_samples: int, used: str, bias: bool
) -> None:
    addresses = {"weight_address": Address(8, 2, 3), "bias_address": Address(11, column_offset=2)}
    problem = double_problem(bias=bias, estimator=estimator, num_samples=num_samples, **addresses)
    problem.x[1] = 0.0  # without a bias its outputs do not vary, and have no gradient by their variance
    check_gradients(problem, used, ALL_INPUTS[1:] if used == "kl" else ALL_INPUTS)


@pytest.mark.parametrize(
    "needed",
    [("x",), ("weight_mu",), ("weight_rho",), ("bias_mu",), ("bias_rho",), ALL_INPUTS[1:], ALL_INPUTS[:3]],
    ids=lambda names: "+".join(names),
)
def test_gradients_of_some_inputs_only(needed: tuple[str, ...]) -> None:
    check_gradients(double_problem(), "both", needed)


@pytest.mark.parametrize("used", ["weight", "kl", "both"])
@pytest.mark.parametrize("prior", PRIORS[1:])
def test_gradients_of_sample_weight_are_those_of_the_reference(prior: str, used: str) -> None:
    problem = double_problem(prior=prior)
    mu, rho = leaves(problem, ("weight_mu", "weight_rho")).values()
    cotangent = torch.randn_like(mu)

    def run(weight: Tensor, kl: Tensor) -> list[Tensor]:
        losses = {"weight": (weight * cotangent).sum(), "kl": 0.3 * kl}
        loss = sum(losses.values()) if used == "both" else losses[used]
        return [loss.detach(), *torch.autograd.grad(loss, (mu, rho))]

    weight = reference.sample_weight(mu, rho, *reference_noise(problem))
    expected = run(weight, reference_kl(problem.weight))
    actual = run(*ops.sample_weight(*problem.sample_weight(torch.float64)))
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    if used == "kl":
        torch.testing.assert_close(run(weight, ops.weight_kl(*problem.weight)), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mixture", [MIXTURE, (0.75, 0.0625, 0.5), (0.5, 0.25, 0.25)], ids=str)
def test_gradients_of_scale_mixture_kl_are_those_of_the_reference(mixture: tuple[float, ...]) -> None:
    problem = double_problem(prior="none", weight_address=Address(8, 2, 3))
    mu, rho = leaves(problem, ("weight_mu", "weight_rho")).values()
    with torch.no_grad():
        rho[0, 0] = -1e4  # below sigma's floor
    numbers = [torch.tensor(number, dtype=torch.float64) for number in mixture]

    def run(kl: Tensor) -> list[Tensor]:
        (grad_mu, grad_rho) = torch.autograd.grad(0.3 * kl, (mu, rho), create_graph=True)
        penalty = grad_mu.square().sum() + grad_rho.square().sum()
        return [kl.detach(), grad_mu.detach(), grad_rho.detach(), *torch.autograd.grad(penalty, (mu, rho))]

    def first_order(kl: Tensor) -> list[Tensor]:
        return [kl.detach(), *torch.autograd.grad(0.3 * kl, (mu, rho))]

    seed, sample, address = reference_noise(problem)
    for way in (first_order, run):
        expected = way(reference.scale_mixture_kl(mu, rho, *numbers, seed, sample, address))
        actual = way(ops.scale_mixture_kl(mu, rho, *numbers, *problem.noise))
        # Sums of 35 terms; second derivatives of up to 1e6.
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("options", [{"prior": "none"}, {"with_kl": False}], ids=["no-prior", "not-wanted"])
def test_a_kl_that_is_not_computed_has_no_gradient(options: dict[str, Any]) -> None:
    problem = double_problem(**options)
    leaves(problem, ALL_INPUTS)
    for name in ("sample_weight", "bayes_linear"):
        result, kl, *_ = getattr(ops, name)(*OPERATORS[name](problem))
        assert result.requires_grad
        assert kl.shape == (0,)
        assert not kl.requires_grad


@pytest.mark.parametrize("with_kl", [True, False], ids=["kl", "no-kl"])
@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_backward_keeps_nothing_but_its_inputs_and_the_seed(leading: tuple[int, ...], with_kl: bool) -> None:
    problem = make_problem((6, 33, 65), prior="per-weight")
    inputs = leaves(problem, ALL_INPUTS)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y, kl = functional.bayes_linear(
            problem.x.view(*leading, 65),
            *problem.weight[:2],
            *problem.bias[:2],
            weight_prior=problem.weight[2:],
            bias_prior=problem.bias[2:],
            with_kl=with_kl,
        )
    # As many with the KL as without: a checkpointed forward may be repeated without it.
    assert len(kept) == 10 + 1
    existing = {tensor.untyped_storage().data_ptr() for tensor in (*inputs.values(), *problem.weight, *problem.bias)}
    new = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in existing]
    assert {(tensor.shape, tensor.dtype) for tensor in new} == {((), torch.int64), ((0, 1), torch.float32)}
    assert sum(tensor.untyped_storage().nbytes() for tensor in new) == 8
    # Nor does a node of the graph hold a tensor by another road.
    nodes = [y.grad_fn, *(node for node, _ in y.grad_fn.next_functions)]
    assert not any(isinstance(value, Tensor) for node in nodes for value in getattr(node, "__dict__", {}).values())
    (y.sum() + (kl if with_kl else 0.0)).backward()  # and that is enough for it


@pytest.mark.parametrize("by", ["hooks on all", "hooks on each", "data"])
def test_what_was_kept_may_be_another_tensor_later(by: str) -> None:
    """A negation that PyTorch puts off is a bit of the tensor, which a kernel would not see."""
    problem = make_problem((6, 33, 65))
    inputs = list(leaves(problem, ALL_INPUTS).values())
    hooks = torch.neg, torch._neg_view
    options = {"weight_prior": (0.0, 1.0), "bias_prior": (0.0, 1.0), "seed": 3, "sample": 1}
    expected = torch.autograd.grad(functional.bayes_linear(*inputs, **options)[0].square().sum(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(*hooks) if by == "hooks on all" else contextlib.nullcontext():
        y, _ = functional.bayes_linear(*inputs, **options)
    for kept in y.grad_fn._raw_saved_tensors if by == "hooks on each" else ():
        kept.register_hooks(*hooks)
    for tensor in inputs if by == "data" else ():
        tensor.data = torch._neg_view(-tensor.data)
    actual = torch.autograd.grad(y.square().sum(), inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("other", [torch.tensor(3, dtype=torch.int32), torch.empty(0, dtype=torch.int64)], ids=str)
def test_a_seed_that_is_another_tensor_later_is_refused(other: Tensor) -> None:
    problem = make_problem((6, 33, 65))
    inputs, seed = list(leaves(problem, ALL_INPUTS).values()), torch.tensor(3)
    linear, (weight, _) = (
        functional.bayes_linear(*inputs, seed=seed)[0],
        functional.sample_weight(*inputs[1:3], seed=seed),
    )
    seed.data = other
    for y in (linear, weight):
        with pytest.raises(RuntimeError, match=r"seed has changed its (dtype|shape) since the forward pass"):
            y.sum().backward()


@pytest.mark.parametrize(("estimator", "num_samples"), CASES)
def test_numerical_derivatives_of_estimators_and_samples(estimator: Estimator, num_samples: int) -> None:
    problem = double_problem((2, 3, 4), prior="none", num_samples=num_samples)
    inputs = list(leaves(problem, ALL_INPUTS).values())

    def run(*tensors: Tensor) -> Tensor:
        return functional.bayes_linear(*tensors, seed=3, num_samples=num_samples, estimator=estimator)[0]

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_local_keeps_one_number_for_each_output() -> None:
    problem = make_problem((6, 33, 65), prior="none", estimator="local")
    inputs = leaves(problem, ALL_INPUTS)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        functional.bayes_linear(*inputs.values(), estimator="local")
    new = [tensor for tensor in kept if all(tensor is not given for given in inputs.values())]
    assert sorted((tuple(tensor.shape), tensor.dtype) for tensor in new)[1:] == [((6, 33), torch.float32)]


@pytest.mark.parametrize("power", [1, 2], ids=["linear", "quadratic"])
@pytest.mark.parametrize("needed", [ALL_INPUTS, ("x",), ("weight_mu",), ("weight_rho", "bias_rho")], ids="+".join)
@pytest.mark.parametrize("used", ["y", "kl", "both"])
def test_second_derivatives_are_those_of_the_reference(used: str, needed: tuple[str, ...], power: int) -> None:
    """Even a loss that is linear in the results has them: a gradient penalty must not be lost."""
    problem = double_problem()
    inputs = leaves(problem, needed)
    others = sum(tensor.sum() for tensor in inputs.values())  # so that no input is unused

    def run(y: Tensor, kl: Tensor) -> list[Tensor | None]:
        losses = {"y": (y * problem.grad_y).sum(), "kl": kl}
        loss = others + (sum(losses.values()) if used == "both" else losses[used])
        gradients = torch.autograd.grad(loss**power, list(inputs.values()), create_graph=True)
        penalty = others + sum(gradient.square().sum() for gradient in gradients)
        return [penalty.detach(), *torch.autograd.grad(penalty, list(inputs.values()))]

    expected = run(*reference_results(problem))
    # Numbers of up to 1e6, sums of 40 terms.
    torch.testing.assert_close(run(*ops.bayes_linear(*problem.forward)[:2]), expected, rtol=1e-12, atol=1e-9)


def test_two_forwards_before_one_backward_have_their_own_noise() -> None:
    problem = double_problem()
    inputs = leaves(problem, ALL_INPUTS)
    parameters = problem.weight[:2] + problem.bias[:2]
    cotangents = torch.randn(2, *problem.grad_y.shape, dtype=torch.float64)
    torch.manual_seed(3)
    outputs = [functional.bayes_linear(problem.x, *parameters)[0] for _ in cotangents]
    torch.manual_seed(3)
    expected = [reference.bayes_linear(problem.x, *parameters, draw_seed()) for _ in cotangents]
    assert not torch.allclose(*outputs)
    for cotangent in (cotangents, cotangents.flip(0)):
        actual, exact = (
            torch.autograd.grad(torch.stack(ys), list(inputs.values()), cotangent, retain_graph=True)
            for ys in (outputs, expected)
        )
        torch.testing.assert_close(actual, exact, rtol=1e-13, atol=1e-13)


def test_second_derivatives_where_one_input_depends_on_another() -> None:
    """A layer applied twice: x of the second call is a function of the same weights, counted once."""
    problem = double_problem((2, 3, 3), prior="none")
    names = ("weight_mu", "weight_rho", "bias_mu", "bias_rho")
    parameters = [leaf.detach().requires_grad_() for leaf in leaves(problem, names).values()]

    def twice(*tensors: Tensor) -> Tensor:
        hidden, _ = functional.bayes_linear(problem.x, *tensors, seed=3)
        return functional.bayes_linear(hidden.tanh(), *tensors, seed=3)[0].square().sum()

    assert torch.autograd.gradcheck(twice, parameters)
    assert torch.autograd.gradgradcheck(twice, parameters)
    first = torch.autograd.grad(twice(*parameters), parameters)
    torch.testing.assert_close(torch.autograd.grad(twice(*parameters), parameters, create_graph=True), first)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)], ids=["both", "seed", "sample"])
def test_vmap_over_seeds_and_samples(dims: tuple[int | None, int | None]) -> None:
    problem = double_problem(prior="none")
    arguments = problem.x, *problem.weight[:2], *problem.bias[:2]
    seeds, samples = torch.arange(3), torch.arange(3) + 5

    def run(seed: Tensor, sample: Tensor) -> Tensor:
        return functional.bayes_linear(*arguments, seed=seed, sample=sample)[0]

    given = [tensor if dim == 0 else tensor[0] for tensor, dim in zip((seeds, samples), dims, strict=True)]
    each = torch.stack([run(*(t[i] if t.dim() else t for t in given)) for i in range(3)])
    torch.testing.assert_close(torch.vmap(run, dims)(*given), each)
