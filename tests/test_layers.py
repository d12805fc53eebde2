"""The laws of all Bayesian layers, each stated once: tests/layers.py has the layers."""

import copy
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layers import KINDS, Kind, Model
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fusedbayes as fb
from fusedbayes.nn import LAYERS
from fusedbayes.reference import Estimator

EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=str)
EACH_ESTIMATOR = pytest.mark.parametrize(
    ("kind", "estimator"), [pytest.param(k, e, id=f"{k}-{e}") for k in KINDS for e in k.layer.estimators]
)
# Batches of another size may be summed in another order, and two backends of the noise differ by 1e-5 times sigma.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(model: nn.Module, x: Tensor, seed: int = 3, sample: int = 0) -> Tensor:
    with fb.frozen_sample(model, seed, sample=sample):
        return model(x)


def deterministic(model: Model) -> Model:
    """The same with a copy of the layer that is replaced."""
    return Model(copy.deepcopy(model.layer).deterministic(), model.kind)


def gradients(model: Model, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_every_layer_is_here() -> None:
    # It is there with Hugging Face's library alone: tests/test_models.py.
    assert {kind.layer for kind in KINDS} | {fb.BayesTransposedLinear} == set(LAYERS)
    assert {kind.layer.__name__ for kind in KINDS} <= set(fb.__all__)


@EACH_KIND
def test_means_are_drawn_as_by_torch(kind: Kind) -> None:
    torch.manual_seed(4)
    ours = dict(kind.layer(**kind.arguments).named_parameters())
    torch.manual_seed(4)
    theirs = dict(kind.layer.replaces(**kind.arguments).named_parameters())
    assert {f"{name}_{part}" for name in theirs for part in ("mu", "rho")} == ours.keys()
    for name, value in theirs.items():
        # torch's Linear computes the same bound by way of sqrt(3) / sqrt(3): the last bit may differ.
        torch.testing.assert_close(ours[f"{name}_mu"], value, rtol=2.0**-22, atol=2.0**-24)


@EACH_ESTIMATOR
def test_sigma_towards_zero_is_the_layer_of_torch(kind: Kind, estimator: Estimator) -> None:
    original, x = Model(kind.layer.replaces(**kind.arguments), kind), kind.batch()
    expected = original(x)
    model = fb.to_bayesian(original, sigma_init=1e-30, estimator=estimator)
    assert type(model.layer) is kind.layer
    assert torch.equal(model(x), expected)
    with fb.mean_mode(model):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [pytest.param(k, e, id=f"{k}-{e}") for k in KINDS if k.linear for e in k.layer.estimators],
)
def test_moments(kind: Kind, estimator: Estimator) -> None:
    """Mean and variance of each output, within five standard errors: sum over weights of (dy/dw)^2 sigma^2."""
    model, x, draws = kind.make(estimator=estimator), kind.batch(), 500
    plain = deterministic(model)
    jacobian = torch.func.jacrev(lambda p: functional_call(plain, p, (x,)))(dict(plain.named_parameters()))
    variance = torch.stack(
        [
            (dy.flatten(plain(x).dim()).double() ** 2 @ torch.nn.functional.softplus(rho.flatten().double()) ** 2)
            for dy, rho in ((jacobian[f"layer.{n}"], model.layer.posterior(n)[1]) for n in model.layer.names())
        ]
    ).sum(0)
    outputs = fb.predict(model, x, draws, seed=5).outputs.double()
    error, standard_error = (outputs.mean(0) - plain(x)).abs(), (variance / draws).sqrt()
    # What does not vary is its mean but for the rounding of some tens of terms.
    assert (error <= 5.0 * standard_error + 1e-5).all()
    assert ((outputs.var(0) - variance).abs() <= 5.0 * variance * math.sqrt(2.0 / (draws - 1)) + 1e-9).all()


@EACH_ESTIMATOR
def test_folded_samples_are_those_of_single_calls(kind: Kind, estimator: Estimator) -> None:
    model, x = kind.make(estimator=estimator), kind.batch()
    folded = fb.predict(model, x, 3, seed=3, samples_at_once=3).outputs
    torch.testing.assert_close(folded, torch.stack([draw(model, x, sample=s) for s in range(3)]), **CLOSE)
    assert not torch.equal(folded[0], folded[1])


@EACH_ESTIMATOR
def test_draws_follow_the_seed(kind: Kind, estimator: Estimator) -> None:
    model, x = kind.make(estimator=estimator), kind.batch()
    assert torch.equal(draw(model, x), draw(model, x))
    assert not torch.equal(draw(model, x), draw(model, x, seed=4))
    assert not torch.equal(draw(model, x), draw(model, x, sample=1))
    runs = []
    for _ in range(2):
        torch.manual_seed(9)
        runs.append(torch.stack([model(x), model(x)]))
    assert torch.equal(*runs)
    assert not torch.equal(*runs[0])


@EACH_ESTIMATOR
def test_derivatives(kind: Kind, estimator: Estimator) -> None:
    """Of the frozen function by mu, rho and x, first and second, in double precision."""
    model, x = kind.make(estimator=estimator, dtype=torch.float64), kind.batch(torch.float64)[:2]
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = torch.randn_like(draw(model, x).detach())  # one number that depends on all outputs

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=False))
        output = functional_call(model, given, (tensors[-1] if x.is_floating_point() else x,))
        return (output * weights).sum() + 0.5 * (output**2).sum()

    inputs = [p.detach().clone().requires_grad_() for p in parameters]
    inputs += [x.requires_grad_()] if x.is_floating_point() else []
    with fb.frozen_sample(model, 3):
        # A padding row has no gradient although the output depends on it.
        padding = getattr(model.layer, "padding_idx", None)
        if padding is None:
            assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
            return
        assert torch.autograd.gradcheck(lambda *tensors: run(*(_without_row(t, padding) for t in tensors)), inputs)


def _without_row(tensor: Tensor, row: int) -> Tensor:
    exists = torch.arange(len(tensor))[:, None] != row
    return torch.where(exists, tensor, tensor.detach().clone().fill_(0.5))


@EACH_ESTIMATOR
def test_zero_input_is_safe(kind: Kind, estimator: Estimator) -> None:
    model, x = kind.make(estimator=estimator), torch.zeros_like(kind.batch())
    if "bias" in model.layer.random_tensors and kind.linear:
        model = kind._replace(arguments=kind.arguments | {"bias": False}).make(estimator=estimator)
        assert model(x).eq(0.0).all()
    x = x.requires_grad_() if x.is_floating_point() else x
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert x.grad is None or x.grad.isfinite().all()


@EACH_KIND
def test_copies(kind: Kind) -> None:
    """deepcopy after a forward, and the state_dict through a file, priors included: the same function and KL."""
    model, x = kind.make(prior_mu=0.1, prior_sigma=0.7), kind.batch()
    y = model(x)
    model.layer.set_prior(0.2, torch.rand_like(model.layer.posterior("weight")[0]) + 0.5) if kind.linear else None
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = kind.make()
    loaded.load_state_dict(torch.load(file))
    for twin in (copy.deepcopy(model), loaded):
        assert torch.equal(draw(twin, x), draw(model, x))
        assert torch.equal(fb.kl_loss(twin), fb.kl_loss(model))
        y.sum().backward(retain_graph=True)
        assert all(p.grad is None for p in twin.parameters())


@EACH_KIND
def test_meta_device(kind: Kind) -> None:
    torch.manual_seed(5)
    ready = kind.layer(**kind.arguments)
    layer = kind.layer(**kind.arguments, device="meta")
    x = kind.batch()
    assert kind.call(layer, x.to("meta")).shape == kind.call(ready, x).shape
    layer.to_empty(device="cpu")
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.testing.assert_close(dict(layer.state_dict()), dict(ready.state_dict()), rtol=0, atol=0)


@EACH_ESTIMATOR
def test_autocast(kind: Kind, estimator: Estimator) -> None:
    """Outputs of the dtype that torch's layer gives; parameters' gradients and the KL stay in float32."""
    model, x = kind.make(estimator=estimator), kind.batch()
    exact, plain = draw(model, x), deterministic(model)
    elbo = fb.ELBO(model, lambda y, _: y.float().square().mean(), 10)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected_dtype, out = draw(model, x), plain(x).dtype, elbo(x, x)
    assert y.dtype == expected_dtype
    # x, W and the sum of some tens of products are rounded to eight bits each.
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=8 * 2.0**-8 * exact.abs().max().item())
    assert out.kl.dtype == torch.float32
    assert {grad.dtype for grad in gradients(model, out.loss).values()} == {torch.float32}


@EACH_ESTIMATOR
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(kind: Kind, estimator: Estimator, dtype: torch.dtype) -> None:
    model = kind.make(estimator=estimator, dtype=dtype)
    x = kind.batch(dtype)
    y, exact = draw(model, x), draw(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * eps * exact.abs().max().item())
    kl = fb.kl_loss(model)
    assert kl.dtype == torch.promote_types(dtype, torch.float32)
    assert {grad.dtype for grad in gradients(model, y.sum() + kl).values()} == {dtype}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("kind", "estimator"),
    [
        pytest.param(kind, estimator, id=f"{kind}-{estimator}")
        for i, kind in enumerate(KINDS)
        for estimator in kind.layer.estimators[i % len(kind.layer.estimators) :][:1]
    ],
)
def test_compiled(kind: Kind, estimator: Estimator) -> None:
    """The ELBO of two samples with torch.compile(fullgraph=True) is what it is without; the estimators take turns."""
    model, x = kind.make(estimator=estimator), kind.batch()
    elbo = fb.ELBO(model, nn.functional.mse_loss, 10, num_samples=2)
    target, results = torch.zeros_like(model(x)), []
    for run in (elbo, torch.compile(elbo, fullgraph=True, backend=kind.backend)):
        torch.manual_seed(1)
        out = run(x, target)
        results.append([out._asdict(), gradients(model, out.loss)])
    torch.testing.assert_close(*results)


@EACH_ESTIMATOR
def test_checkpointed_elbo(kind: Kind, estimator: Estimator) -> None:
    """A forward with the KL that is repeated without it: the weights of before, and gradients of all of it."""
    model, x = kind.make(estimator=estimator), kind.batch()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=False)

    results = []
    for run in (model, Checkpointed()):
        torch.manual_seed(21)
        out = fb.ELBO(run, lambda y, _: y.square().mean(), 10)(x, x)
        torch.testing.assert_close(out.kl, fb.kl_loss(model), rtol=1e-6, atol=0)
        results.append(gradients(model, out.loss))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@EACH_KIND
def test_round_trip(kind: Kind) -> None:
    """Converted and back: parameters, attributes and text, and the Bayesian layer's text has the arguments."""
    original = kind.layer.replaces(**kind.arguments).eval()
    before = copy.deepcopy(original)
    parameters = list(original.parameters())
    layer = fb.to_bayesian(original)
    assert repr(layer) == repr(kind.layer(**kind.arguments))
    assert layer.extra_repr().startswith(before.extra_repr())
    back = fb.to_deterministic(layer)
    assert type(back) is kind.layer.replaces
    assert str(back) == str(before)
    assert all(a is b for a, b in zip(back.parameters(), parameters, strict=True))
    torch.testing.assert_close(dict(back.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    assert vars(back).keys() == vars(before).keys()
    attributes, expected = ({k: v for k, v in vars(m).items() if k[0] != "_"} for m in (back, before))
    assert attributes == expected


@EACH_KIND
def test_one_draw_does_not_depend_on_the_batch(kind: Kind) -> None:
    """Of the frozen function, whatever the estimator draws for a row: the first row alone is the first of all."""
    for estimator in kind.layer.estimators:
        model, x = kind.make(estimator=estimator), kind.batch()
        torch.testing.assert_close(draw(model, x[:1]), draw(model, x)[:1], **CLOSE)


@pytest.mark.gpu
@EACH_ESTIMATOR
def test_cuda_equals_cpu(kind: Kind, estimator: Estimator) -> None:
    model, x = kind.make(estimator=estimator), kind.batch()
    twin = copy.deepcopy(model).to("cuda")
    results = []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for run, there in ((model, x), (twin, x.to("cuda"))):
            y = draw(run, there)
            grads = gradients(run, y.square().sum() + fb.kl_loss(run))
            results.append([y.cpu(), fb.kl_loss(run).cpu(), {name: grad.cpu() for name, grad in grads.items()}])
    # Noise differs by 1e-5 times sigma, sums of up to a few hundred terms are rounded in another order.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def options(kind: Kind, **others: Any) -> dict[str, Any]:
    return kind.arguments | others


@EACH_KIND
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"prior_sigma": 0.0}, "prior_sigma must be finite and positive, got 0.0"),
        ({"sigma_init": math.inf}, "sigma_init must be finite and positive, got inf"),
        ({"estimator": "magic"}, "estimator must be one of 'shared'.*, got 'magic'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_constructor_errors(kind: Kind, option: dict[str, Any], message: str) -> None:
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        kind.layer(**options(kind, **option))
    assert torch.equal(torch.get_rng_state(), generator)
