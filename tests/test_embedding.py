"""What the embedding has of its own: it draws what is looked up, and no more."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedbayes as fb
from fusedbayes import functional
from fusedbayes.reference import ESTIMATORS, Estimator

ROWS, COLUMNS = 7, 5


def table(**options: Any) -> fb.BayesEmbedding:
    return fb.BayesEmbedding(ROWS, COLUMNS, sigma_init=0.3, **options)


def frozen(layer: nn.Module, x: Tensor, **options: Any) -> Tensor:
    with fb.frozen_sample(layer, 3, **options):
        return layer(x)


def test_a_row_is_that_of_a_drawn_table() -> None:
    layer = table()
    with fb.frozen_sample(layer, 3, sample=2):
        address = layer._noises[-1].addresses["weight"]
    drawn, _ = functional.sample_weight(*layer.posterior("weight"), seed=3, sample=2, address=address)
    x = torch.tensor([[6, 0, 6], [3, 6, 1]])
    # Two ways to round mu + sigma eps.
    torch.testing.assert_close(frozen(layer, x, sample=2), drawn[x], rtol=1e-6, atol=1e-6)


def test_lookups_of_one_row() -> None:
    """Under "shared" they are one draw; "local" draws each; "flipout" has one draw's size with signs of its own."""
    x = torch.full((2, 50), 4)
    for estimator in ESTIMATORS:
        layer = table(estimator=estimator)
        deviation = (layer(x) - layer.weight_mu[4]).detach().flatten(0, 1)
        assert (deviation.std(0) > 1e-6).all() == (estimator != "shared")
        # mu + deviation is rounded: the sizes agree to a few parts in 2^-24 of mu.
        assert (deviation.abs().std(0) > 1e-6).all() == (estimator == "local")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_only_rows_that_are_looked_up_have_gradients(estimator: Estimator, sparse: bool) -> None:
    layer = table(estimator=estimator, sparse=sparse, padding_idx=1)
    layer(torch.tensor([[2, 5], [1, 2]])).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.is_sparse == sparse
        rows = parameter.grad.to_dense().abs().sum(1).nonzero().flatten().tolist()
        assert rows == [2, 5]


def test_sparse_gradients_train() -> None:
    layer = table(sparse=True)
    before = layer.weight_mu.detach().clone()
    optimizer = torch.optim.SparseAdam(layer.parameters(), lr=0.1)
    layer(torch.tensor([2, 5])).square().sum().backward()
    optimizer.step()
    assert (layer.weight_mu != before).any(1).tolist() == [row in (2, 5) for row in range(ROWS)]


def test_scale_grad_by_freq() -> None:
    x = torch.tensor([2, 2, 2, 5])
    grads = []
    for scaled in (False, True):
        layer = table(scale_grad_by_freq=scaled)
        with torch.no_grad():
            layer.weight_mu.fill_(1.0)
        frozen(layer, x).sum().backward()
        grads.append((layer.weight_mu.grad, layer.weight_rho.grad))
    for plain, scaled in zip(*grads, strict=True):
        torch.testing.assert_close(plain[2], 3 * scaled[2])
        torch.testing.assert_close(plain[5], scaled[5])


class _Sizes(TorchDispatchMode):
    """Notes how many numbers the tensors hold that operations return, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ != "detach":
            tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.largest = max([self.largest, *((t._values() if t.is_sparse else t).numel() for t in tensors)])
        return result


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_of_the_size_of_the_table_is_computed(estimator: Estimator) -> None:
    layer, x = fb.BayesEmbedding(3000, 8, sparse=True, estimator=estimator, padding_idx=0), torch.tensor([[1, 0, 2999]])
    with _Sizes() as sizes:
        layer(x).sum().backward()
    assert 0 < sizes.largest <= 4 * 3 * 8  # a handful of lookups; noise in PyTorch has its words side by side


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
@pytest.mark.parametrize("prior", ["scalar", "per weight"])
def test_padding_is_neither_drawn_nor_charged(padding_idx: int, prior: str) -> None:
    layer = table(padding_idx=padding_idx)
    row = padding_idx % ROWS
    assert layer.padding_idx == row
    others = [i for i in range(ROWS) if i != row]
    if prior == "per weight":
        layer.set_prior(torch.randn(ROWS, COLUMNS), torch.rand(ROWS, COLUMNS) + 0.5)
    assert layer(torch.tensor(row)).eq(0.0).all()
    mu, rho, *priors = layer.gaussian("weight")
    expected = functional.weight_kl(mu[others], rho[others], tuple(p if p.dim() == 0 else p[others] for p in priors))
    torch.testing.assert_close(fb.kl_loss(layer), expected, rtol=1e-6, atol=0)
    out = fb.ELBO(layer, lambda y, _: y.square().mean(), 10)(torch.tensor([[row, 2]]), None)
    torch.testing.assert_close(out.kl, expected, rtol=1e-6, atol=0)
    out.loss.backward()
    for parameter in layer.parameters():
        # Exactly: an optimizer such as Adam makes a step of the smallest gradient.
        assert parameter.grad[row].eq(0.0).all()
        assert parameter.grad[others].ne(0.0).any(1).all()


def test_padding_that_is_the_whole_table() -> None:
    layer = fb.BayesEmbedding(1, 3, padding_idx=0)
    assert fb.kl_loss(layer).item() == 0.0
    fb.kl_loss(layer).backward()
    assert layer(torch.tensor([0])).eq(0.0).all()


def test_max_norm_bounds_the_means_in_place() -> None:
    layer = table(max_norm=1.0)
    with torch.no_grad():
        layer.weight_mu.fill_(1.0)
    y = frozen(layer, torch.tensor([2, 5]))
    norms = layer.weight_mu.norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([5**0.5 if i not in (2, 5) else 1.0 for i in range(ROWS)]))
    assert (y - layer.weight_mu[[2, 5]]).abs().min() > 0


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 0), (2, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_indices_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randint(0, ROWS, shape, dtype=dtype)
    for estimator in ESTIMATORS:
        assert table(estimator=estimator)(x).shape == (*shape, COLUMNS)


class Positions(nn.Module):
    """Tokens and their positions, which are the same for all rows."""

    def __init__(self, estimator: Estimator) -> None:
        super().__init__()
        self.tokens, self.positions = table(estimator=estimator), table(estimator=estimator)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.positions(torch.arange(x.shape[1])[None])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_positions_of_one_row_serve_a_batch_of_samples(estimator: Estimator) -> None:
    model, x = Positions(estimator), torch.randint(0, ROWS, (2, 4))
    folded = fb.predict(model, x, 3, seed=3, samples_at_once=3).outputs
    torch.testing.assert_close(folded, torch.stack([frozen(model, x, sample=s) for s in range(3)]))
    elbo = fb.ELBO(model, F.mse_loss, 10, num_samples=3, samples_at_once=3)
    assert elbo(x, torch.zeros(2, 4, COLUMNS)).loss.isfinite()


def test_a_vector_of_indices_is_a_batch() -> None:
    layer, x = table(), torch.tensor([1, 2, 1])
    folded = fb.predict(layer, x, 3, seed=3, samples_at_once=3).outputs
    torch.testing.assert_close(folded, torch.stack([frozen(layer, x, sample=s) for s in range(3)]))


@pytest.mark.parametrize("x", [torch.tensor([ROWS]), torch.tensor([-1]), torch.tensor([1.0]), [1]], ids=repr)
def test_bad_indices_leave_the_generator_as_it_was(x: Any) -> None:
    layer, generator = table(), torch.get_rng_state()
    with pytest.raises((IndexError, RuntimeError, TypeError)):
        layer(x)
    assert torch.equal(torch.get_rng_state(), generator)
