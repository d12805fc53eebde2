"""How Bayesian layers get on with the rest of torch: copying, saving, precisions, compilation, checkpointing."""

import concurrent.futures
import copy
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedbayes import ELBO, BayesLinear, backend_info, frozen_sample, functional, kl_loss, predict
from fusedbayes.reference import ESTIMATORS, Estimator

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler"
)
# torch still uses it in modules that it imports late.
ignore_torch_jit = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code and recompilation counts do not leak from test to test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(**options: Any) -> nn.Sequential:
    return nn.Sequential(BayesLinear(5, 7, **options), nn.ReLU(), BayesLinear(7, 3, **options))


def function_draw(model: nn.Module, x: Tensor, seed: int = 11) -> Tensor:
    with frozen_sample(model, seed):
        return model(x)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = network()
    fresh.load_state_dict(torch.load(file))
    return fresh


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file, through_state_dict])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    """A copy made after a forward, while its graph is alive, inside a context: same function, noise of its own."""
    model = network(prior_sigma=0.7, sigma_init=0.2)
    x = torch.randn(4, 5)
    y = model(x)
    with frozen_sample(model, 1):
        twin = copied(model)
        assert torch.equal(model(x), model(x))
        assert not torch.equal(twin(x), twin(x))
    assert_equal(dict(twin.state_dict()), dict(model.state_dict()))
    assert_equal(function_draw(twin, x), function_draw(model, x))
    assert torch.equal(kl_loss(twin), kl_loss(model))
    y.sum().backward()
    assert all(p.grad is None for p in twin.parameters())


@ignore_torch_jit
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_of_a_layer_compiled_in_place(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = BayesLinear(5, 3)
    layer.compile()
    assert_equal(dict(copied(layer).state_dict()), dict(layer.state_dict()))


def test_meta_device() -> None:
    torch.manual_seed(5)
    ready = network(sigma_init=0.3)
    model = network(sigma_init=0.3, device="meta").to_empty(device="cpu")
    torch.manual_seed(5)
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    assert_equal(dict(model.state_dict()), dict(ready.state_dict()))


def test_autocast() -> None:
    """Under autocast the products are bfloat16; parameters, their gradients and the KL stay float32."""
    model = network()
    elbo = ELBO(model, F.mse_loss, 10)
    x = torch.randn(6, 5)
    exact = function_draw(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = function_draw(model, x)
        out = elbo(x, torch.zeros(6, 3))
    assert y.dtype == torch.bfloat16
    # x, W and the sums of two layers are rounded to bfloat16's eight bits.
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=4 * 2.0**-8 * exact.abs().max().item())
    assert out.kl.dtype == out.loss.dtype == torch.float32
    # The fused and the separate KL add the same terms in another order.
    torch.testing.assert_close(out.kl, kl_loss(model), rtol=1e-6, atol=0)
    assert {grad.dtype for grad in gradients(out.loss, model).values()} == {torch.float32}


@pytest.mark.parametrize(
    "convert",
    [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda model: model.to("cpu", torch.float64)],
    ids=["half", "bfloat16", "double", "to"],
)
def test_change_of_dtype(convert: Callable[[nn.Module], nn.Module]) -> None:
    model = convert(network())
    dtype = model[0].weight_mu.dtype
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    y = model(torch.ones(2, 5, dtype=dtype))
    assert y.dtype == dtype
    assert {grad.dtype for grad in gradients(y.sum() + kl_loss(model), model).values()} == {dtype}


@ignore_torch_jit
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(backend: str) -> None:
    """torch.compile(fullgraph=True): the same function draw and gradients as eager; without one, fresh draws."""
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(6, 5)
    with frozen_sample(model, 4):
        expected, actual = model(x), compiled(x)
    # Inductor may fuse the ReLU with its neighbours, but rounds as eager does: five to seven terms of size 1.
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(actual, expected, **close)
    torch.testing.assert_close(gradients(actual.sum(), model), gradients(expected.sum(), model), **close)
    assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_prediction_does_not_recompile_for_each_sample() -> None:
    """More samples than torch's limit of eight recompilations, which is an error where the full graph is asked for."""
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 5)
    actual, expected = (predict(m, x, num_samples=10, seed=3).outputs for m in (compiled, model))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_checkpointing_draws_the_same_weights_again() -> None:
    layer = BayesLinear(5, 4)
    run = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    x = torch.eye(5, requires_grad=True)
    y = run(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    # For the unit matrix row i of y is W[:, i] + b, so sums of W's columns differ as the rows of y and as dX do.
    torch.testing.assert_close(grad[0] - grad[0, 0], (y - y[0]).sum(1).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    """The recomputation draws the weights of the forward: the gradients are those without checkpointing."""
    model = network()
    x = torch.randn(6, 5, requires_grad=True)
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        torch.manual_seed(21)
        run(x).square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in results[1].values())
    assert_equal(results[1], results[0])


def test_functional_call() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    other = {name: torch.randn_like(p, requires_grad=True) for name, p in model.named_parameters()}
    x = torch.randn(4, 5)
    twin = network()
    twin.load_state_dict(other, strict=False)
    with frozen_sample(model, 3), frozen_sample(twin, 3):
        y = torch.func.functional_call(model, other, (x,))
        assert_equal(y, twin(x))
    grads = torch.autograd.grad(y.sum(), list(other.values()))
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert all(p.grad is None for p in model.parameters())
    assert_equal(dict(model.state_dict()), dict(before))


@ignore_torch_jit
def test_torch_func() -> None:
    """torch.func.grad and jvp give what autograd and a difference give: the layer is affine in x."""
    layer = BayesLinear(5, 3)
    x, direction = torch.randn(4, 5), torch.randn(4, 5)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    with frozen_sample(layer, 1):
        actual = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
        torch.testing.assert_close(actual, gradients(layer(x).square().sum(), layer), rtol=1e-5, atol=1e-5)
        y, tangent = torch.func.jvp(layer, (x,), (direction,))
        # Sums of six terms of size 1, subtracted.
        torch.testing.assert_close(tangent, layer(x + direction) - y, rtol=1e-5, atol=1e-5)


@ignore_torch_jit
def test_torch_func_within_torch_compile() -> None:
    """An operator is opaque to a compiled transform as it is to an eager one."""
    layer = BayesLinear(6, 4)
    x, direction = torch.randn(3, 6), torch.randn(3, 6)

    def tangent(x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return functional.bayes_linear(x, layer.weight_mu, layer.weight_rho, seed=seed)[0]

        return torch.func.jvp(run, (x,), (direction,))[1]

    seed = torch.tensor(3)
    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager")(x), tangent(x))
    assert tangent(x).abs().max() > 0


@ignore_torch_jit
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "fixed"])
def test_forward_mode_is_right_or_refused(trainable: bool) -> None:
    """A directional derivative along x must not silently come out as zero."""
    layer = BayesLinear(5, 3).requires_grad_(trainable)
    x, direction = torch.randn(4, 5), torch.randn(4, 5)
    with frozen_sample(layer, 1):
        expected = (layer(x + direction) - layer(x)).detach()  # the layer is affine in x
        try:
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
        except (NotImplementedError, RuntimeError):
            return
    assert tangent is not None
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-5)


def test_inference_mode() -> None:
    model = network()
    x = torch.randn(4, 5)
    with torch.inference_mode():
        y, kl = function_draw(model, x), kl_loss(model)
    assert_equal(y, function_draw(model, x))
    assert_equal(kl, kl_loss(model))


@pytest.mark.parametrize("of_kl", [False, True], ids=["loss", "KL alone"])
@pytest.mark.parametrize("name", ["x", "weight_mu", "weight_rho", "bias_mu", "bias_rho"])
@pytest.mark.parametrize("what", ["shape", "dtype"])
def test_what_is_another_tensor_before_the_backward_pass_is_refused(name: str, of_kl: bool, what: str) -> None:
    layer, x = BayesLinear(5, 7), torch.randn(4, 5)
    output = ELBO(layer, lambda y, _: y.square().mean(), num_data=1)(x, None)
    changed = x if name == "x" else getattr(layer, name)
    changed.data = torch.zeros(2, 3) if what == "shape" else changed.data.half()
    with pytest.raises(RuntimeError, match=f"{name} has changed its {what} since the forward pass"):
        (output.kl if of_kl else output.loss).backward()


@pytest.mark.skipif(backend_info()["cpu"].name == "reference", reason="PyTorch's own operations read what is gone")
def test_a_parameter_whose_memory_is_gone_is_refused() -> None:
    layer, x = BayesLinear(5, 7), torch.randn(4, 5)
    y = layer(x)
    layer.weight_rho.untyped_storage().resize_(0)
    for use in (lambda: layer(x), lambda: y.sum().backward(), lambda: kl_loss(layer)):
        with pytest.raises(RuntimeError, match=r"has lost its memory|out of bounds for storage"):
            use()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_backward_pass_in_inference_mode_leaves_nothing_behind(estimator: Estimator) -> None:
    """What a thread keeps for its next layers is made by whichever comes first: here it has nothing yet."""
    x, weight = torch.randn(4, 5), [torch.randn(3, 5, requires_grad=True) for _ in range(2)]

    def backward(inference: bool) -> tuple[Tensor, ...]:
        y, _ = functional.bayes_linear(x, *weight, seed=3, num_samples=2, estimator=estimator)
        loss = y.sum()
        with torch.inference_mode(inference):
            return torch.autograd.grad(loss, weight)

    with concurrent.futures.ThreadPoolExecutor(1) as fresh_thread:
        inside, outside = fresh_thread.map(backward, (True, False))
    assert_equal(inside, outside)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_forward_draws_from_the_generator(training: bool) -> None:
    """Evaluation mode samples too; torch.manual_seed makes a run repeat."""
    model = network().train(training)
    x = torch.randn(4, 5)
    runs = []
    for _ in range(2):
        torch.manual_seed(9)
        runs.append([model(x), model(x)])
    assert_equal(runs[0], runs[1])
    assert not torch.equal(runs[0][0], runs[0][1])


class _OperatorCalls(TorchDispatchMode):
    """Notes the package's operators, with the number of KL values that each returns."""

    def __init__(self) -> None:
        super().__init__()
        self.kl_values: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fusedbayes":
            kl = result[1] if isinstance(result, tuple) else result
            self.kl_values.append((func._schema.name.split("::")[1], kl.numel()))
        return result


def test_no_kl_work_unless_asked() -> None:
    model = network()
    x = torch.randn(4, 5)
    with _OperatorCalls() as plain:
        model(x)
    assert plain.kl_values == [("bayes_linear", 0)] * 2
    with _OperatorCalls() as asked:
        ELBO(model, F.mse_loss, 10)(x, torch.zeros(4, 3))
    assert asked.kl_values == [("bayes_linear", 1)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1], ids=["current_device", "other_device"])
def test_cuda_equals_cpu(index: int) -> None:
    if index >= torch.cuda.device_count():
        pytest.skip("needs a second GPU")
    model = network()
    twin = copy.deepcopy(model).to(f"cuda:{index}")
    x = torch.randn(33, 5)
    expected, actual = function_draw(model, x), function_draw(twin, x.to(f"cuda:{index}"))
    # eps agrees to 1e-5 (sigma is below 0.05, sums have at most eight terms); products are rounded in another order.
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl_loss(twin).cpu(), kl_loss(model), rtol=1e-5, atol=0)
    expected_gradients = gradients(expected.square().sum() + kl_loss(model), model)
    actual_gradients = {n: g.cpu() for n, g in gradients(actual.square().sum() + kl_loss(twin), twin).items()}
    # Sums over 33 rows of terms of size 1 to 10, each with the error above.
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-4, atol=1e-3)
