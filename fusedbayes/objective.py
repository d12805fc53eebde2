"""The training objective: the negative evidence lower bound per example.

docs/kl.md says which coefficient belongs where and why.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedbayes import folding
from fusedbayes.checks import check_count, check_non_negative, describe
from fusedbayes.nn.context import FusedKL
from fusedbayes.nn.module import BayesModule
from fusedbayes.nn.traverse import bayes_modules, variational_parameters
from fusedbayes.reference import compute_dtype
from fusedbayes.schedules import Schedule


def kl_loss(model: nn.Module) -> Tensor:
    """KL of the posterior from the prior in nats, summed over each distinct Bayesian parameter of `model` once.

    Computed from the parameters as they are now: it depends neither on what was forwarded nor how often, and layers
    that share parameters are charged once. `ELBO` gets the same number fused with the forward pass.

    Args:
        model: any module; wrappers such as torch.compile's are looked through.

    Returns:
        0-d float32 tensor (float64 for float64 parameters), differentiable; zero if no layer is Bayesian.

    Raises:
        TypeError: `model` is not a module.
    """
    return _sum([p.layer.kl_of(p.name) for p in variational_parameters(model)], model)


class ElboOutput(NamedTuple):
    """What `ELBO` returns: three 0-d tensors, with ``loss = nll + kl_weight * kl / num_data``.

    Attributes:
        loss: the negative ELBO per example, to be minimised.
        nll: mean negative log likelihood per example.
        kl: KL of the whole posterior in nats, unweighted.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor


class ELBO(nn.Module):
    """Negative evidence lower bound per example, ``loss = mean nll + kl_weight * kl / num_data``.

    An unbiased estimate of the bound over the whole training set, divided by its size, from one minibatch: the
    likelihood is averaged over the minibatch, so the KL is divided by the size of the training set and by nothing else
    (Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.4, whose sum over a minibatch this
    divides by its size).

    Args:
        model: a module with Bayesian layers.
        nll: called as ``nll(model(x), y)``; returns the negative log likelihood in nats, 0-d averaged over the batch
            (such as torch.nn.functional.cross_entropy) or per example, which is then averaged here.
        num_data: examples in the training set, not in the minibatch.
        kl_weight: a number >= 0 (default 1, the bound itself), or a schedule: a callable from the number of training
            steps already done to a number (`fusedbayes.schedules`). With a schedule, and where the model
            checkpoints activations, compile the model and not the ELBO.
        num_samples: Monte Carlo samples of the weights per call over which nll is averaged (default 1). They run as one
            batch, x repeated along dimension 0, and each Bayesian layer reads its parameters once for all of them; nll
            gets the output of one sample at a time.
        samples_at_once: how many samples are one batch. Default: as many as make an input of at most 2**24 numbers. 1
            runs them one after another, for a model that does not treat dimension 0 as the batch, such as one with
            BatchNorm in training mode.

    Shape:
        ``elbo(x, y)``: whatever `model` and `nll` take.

    Attributes:
        step: what the schedule is asked for next, in the state_dict; a call in training mode with gradients enabled
            counts as one step. It stays 0 without a schedule.

    Raises:
        TypeError: num_data, num_samples or samples_at_once is not an int, or kl_weight neither a number nor callable.
        ValueError: num_data, num_samples or samples_at_once below 1, a negative kl_weight, or a model without a
            Bayesian layer; at a call with several samples at once, a module that is known to mix the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        nll: Callable[[Tensor, Tensor], Tensor],
        num_data: int,
        *,
        kl_weight: float | Schedule = 1.0,
        num_samples: int = 1,
        samples_at_once: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(nll):
            raise TypeError(f"nll must be callable as nll(output, target), got {describe(nll)}")
        if next(bayes_modules(model), None) is None:
            raise ValueError("model has no Bayesian layer, so its KL is zero: convert it with fusedbayes.to_bayesian")
        self.num_data = check_count(num_data, "num_data")
        self.num_samples = check_count(num_samples, "num_samples")
        self.samples_at_once = None if samples_at_once is None else check_count(samples_at_once, "samples_at_once")
        self.kl_weight = kl_weight if callable(kl_weight) else check_non_negative(kl_weight, "kl_weight")
        self.nll = nll
        self.model = model
        self.step = 0

    def forward(self, x: Any, y: Any) -> ElboOutput:
        at_once = folding.samples_at_once(x, self.num_samples, self.samples_at_once)
        if at_once > 1:
            folding.check_foldable(self.model)
        with _fused_kl(self.model) as kl_of_forward:
            nll = self._nll_of_samples(x, y, at_once)
        for begin in range(at_once, self.num_samples, at_once):
            nll = nll + self._nll_of_samples(x, y, min(at_once, self.num_samples - begin))
        if self.num_samples > 1:
            nll = nll / self.num_samples
        kl = kl_of_forward()
        # A model may lie on several devices: the outputs are on the last one.
        return ElboOutput(nll + (self._current_kl_weight() / self.num_data) * kl.to(nll.device), nll, kl)

    def _nll_of_samples(self, x: Any, y: Any, at_once: int) -> Tensor:
        """The sum over so many samples of their mean nll, in one forward."""
        if at_once == 1:
            return self._mean_nll(self.model(x), y)
        layers = [layer for _, layer in bayes_modules(self.model)]
        with folding.drawing(layers, at_once, x) as folded:
            output = folding.recalled(self.model(folded), layers, at_once, x)
        outputs = folding.unfold(output, at_once, folding.batch_size(x))
        return torch.stack([self._mean_nll(each, y) for each in outputs]).sum()

    def _mean_nll(self, output: Any, y: Any) -> Tensor:
        nll = self.nll(output, y)
        if not isinstance(nll, Tensor):
            raise TypeError(f"nll must return a tensor, got {describe(nll)}")
        # In fp32 or better: a sum of many half-precision terms would stand still.
        dtype = compute_dtype(nll)
        return nll if nll.dim() == 0 and nll.dtype == dtype else nll.mean(dtype=dtype)

    def _current_kl_weight(self) -> float:
        if not callable(self.kl_weight):
            return self.kl_weight
        weight = check_non_negative(self.kl_weight(self.step), "kl_weight")
        if self.training and torch.is_grad_enabled():
            self.step += 1
        return weight

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)


@contextlib.contextmanager
def _fused_kl(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Has the forwards inside compute the KL of the layers they pass through; yields a function that adds it up.

    What a forward could not give, because a layer was not reached, shares parameters with another, ran on others
    (torch.func.functional_call) or without gradients (reentrant checkpointing), is computed from the parameters.
    """
    owned: dict[BayesModule, list[str]] = {}
    for _, layer, name in variational_parameters(model):
        owned.setdefault(layer, []).append(name)
    fused = [layer for layer, names in owned.items() if names == layer.names()]
    results: dict[BayesModule, FusedKL | None] = {}

    def total() -> Tensor:
        kls = []
        for layer, names in owned.items():
            result = results.get(layer)
            if result is not None and _is_current(result, layer):
                kls.append(result.kl)
            else:
                kls += [layer.kl_of(name) for name in names]
        return _sum(kls, model)

    for layer in fused:
        vars(layer)["_kl_wanted"] = True
    try:
        yield total
    finally:
        for layer in fused:
            results[layer] = layer._kl_of_forward
            vars(layer)["_kl_wanted"] = False
            vars(layer)["_kl_of_forward"] = None


def _is_current(result: FusedKL, layer: BayesModule) -> bool:
    """Whether the KL is of the layer's present parameters, and differentiable in those that want a gradient."""
    present, then = layer.posteriors(), result.parameters
    if len(present) != len(then) or not all(map(operator.is_, then, present)):
        return False
    differentiable = result.kl.requires_grad
    if not torch.is_grad_enabled() or (differentiable and all(result.requires_grad)):
        return True
    return all(
        (differentiable and had) or not now.requires_grad
        for had, now in zip(result.requires_grad, present, strict=True)
    )


def _sum(kls: list[Tensor], model: nn.Module) -> Tensor:
    if not kls:
        anchor = next(model.parameters(), torch.empty(0))
        return torch.zeros((), device=anchor.device)
    # Layers may lie on several devices: the sum goes where the first of them is.
    first, *others = kls
    return functools.reduce(lambda total, kl: total + kl.to(total.device), others, first)
