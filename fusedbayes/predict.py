"""Prediction: which weights a forward draws, and what many draws say together."""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fusedbayes import folding
from fusedbayes.arguments import check_estimator
from fusedbayes.checks import check_count, check_non_negative, describe
from fusedbayes.nn.context import FrozenNoise, MeanWeights
from fusedbayes.nn.module import BayesModule
from fusedbayes.nn.traverse import bayes_modules, identity, variational_parameters
from fusedbayes.noise import Address, as_sample, as_seed, draw_seed
from fusedbayes.reference import Estimator, compute_dtype

# Layers are numbered below 2^28, so that a stream, 8 * layer + role, is a non-negative int32.
_LAYERS = 2**28


class Prediction:
    """Monte Carlo samples of a model's output, and their summaries.

    Args:
        outputs: (samples, batch, ...) tensor of what the model returned for each draw of its weights.
        class_dim: for classification, the dimension of a single output (batch, ...) that holds the classes' logits.

    The classification summaries read `outputs` as logits. They are computed when first asked for, in float32 or
    better; entropies are in nats, and predictive = expected + mutual information (Depeweg et al., "Decomposition of
    uncertainty in Bayesian deep learning for efficient and risk-sensitive learning", ICML 2018).
    """

    def __init__(self, outputs: Tensor, class_dim: int = -1) -> None:
        self.outputs = outputs
        self.class_dim = class_dim

    @property
    def _exact_outputs(self) -> Tensor:
        return self.outputs.to(compute_dtype(self.outputs))

    @cached_property
    def _log_probs(self) -> Tensor:
        shape = self.outputs.shape[1:]
        if not -len(shape) <= self.class_dim < len(shape) or len(shape) < 2:
            raise ValueError(
                f"class_dim is {self.class_dim}, but one output has shape {tuple(shape)}: (batch, classes)?"
            )
        if shape[self.class_dim] < 2:
            raise ValueError(
                f"classification needs at least two logits, dimension {self.class_dim} of an output holds "
                f"{shape[self.class_dim]}: give a single logit z as the pair (0, z)"
            )
        return torch.log_softmax(self._exact_outputs.movedim(self._dim, -1), -1)

    @property
    def _dim(self) -> int:
        return self.class_dim if self.class_dim < 0 else self.class_dim + 1

    @cached_property
    def log_mean_probs(self) -> Tensor:
        """Logarithm of `mean_probs`, without underflow: what the negative log likelihood of held-out data takes."""
        num_samples = self.outputs.shape[0]
        return (self._log_probs.logsumexp(0) - math.log(num_samples)).movedim(-1, self.class_dim)

    @cached_property
    def mean_probs(self) -> Tensor:
        """Class probabilities averaged over the samples: an output's shape, (batch, ...)."""
        return self.log_mean_probs.exp()

    @cached_property
    def predictive_entropy(self) -> Tensor:
        """Entropy of `mean_probs`, the total uncertainty: (batch, ...) without the classes."""
        return torch.special.entr(self._log_probs.exp().mean(0)).sum(-1)

    @cached_property
    def expected_entropy(self) -> Tensor:
        """Mean entropy of the samples' own probabilities, the aleatoric part: shape of `predictive_entropy`."""
        return torch.special.entr(self._log_probs.exp()).sum(-1).mean(0)

    @cached_property
    def mutual_information(self) -> Tensor:
        """Between class and weights, the epistemic part, >= 0: predictive minus expected entropy."""
        return (self.predictive_entropy - self.expected_entropy).clamp(min=0.0)

    @cached_property
    def mean(self) -> Tensor:
        """For regression, the mean over the samples: an output's shape."""
        return self._exact_outputs.mean(0)

    @cached_property
    def epistemic_std(self) -> Tensor:
        """For regression, the standard deviation over the samples (divisor samples - 1): an output's shape.

        Raises:
            ValueError: there is one sample, whose spread is unknown.
        """
        if self.outputs.shape[0] < 2:
            raise ValueError("a standard deviation needs num_samples of at least 2, got 1")
        return self._exact_outputs.std(0)

    def std(self, noise_sigma: float | Tensor) -> Tensor:
        """For regression, the standard deviation of a new observation, sqrt(epistemic_std^2 + noise_sigma^2).

        Args:
            noise_sigma: standard deviation of the observation noise (aleatoric), >= 0: a number, or a tensor that
                broadcasts to an output.

        Raises:
            ValueError: a negative number.
        """
        if not isinstance(noise_sigma, Tensor):
            check_non_negative(noise_sigma, "noise_sigma")
        spread = self.epistemic_std
        return torch.hypot(spread, torch.as_tensor(noise_sigma, dtype=spread.dtype, device=spread.device))

    def __repr__(self) -> str:
        return f"Prediction(outputs={tuple(self.outputs.shape)} {self.outputs.dtype}, class_dim={self.class_dim})"


@torch.no_grad()
def predict(
    model: nn.Module,
    x: Any,
    num_samples: int = 32,
    *,
    seed: int | Tensor | None = None,
    class_dim: int = -1,
    estimator: Estimator | None = None,
    samples_at_once: int | None = None,
) -> Prediction:
    """Runs `model` on `x` under `num_samples` draws of its weights.

    Sample s is the function of ``frozen_sample(model, seed, sample=s)``: with the estimator "shared" one consistent
    draw for the whole batch. The samples run as one batch: `x` is repeated along dimension 0, and each Bayesian layer
    reads its parameters once for all of them, so every module of the model has to treat dimension 0 as the batch. The
    modules are put into evaluation mode (dropout off, batch statistics fixed) and each back into its own afterwards.
    Not for several threads at once on one model: give each thread its copy.

    Args:
        model: any module; its output must be one tensor, (batch, ...).
        x: the model's input, passed as ``model(x)``: a tensor, or a tuple, list or dict of tensors, (batch, ...) each.
            Anything else is run sample by sample, and so is a tensor of one dimension.
        num_samples: number of draws, 1 or more (default 32).
        seed: an int or a 0-d int64 tensor; default a fresh one from torch's generator.
        class_dim: of a single output, for the classification summaries (default the last).
        estimator: in place of the layers' own (default None). With "local" each row is a sample of its own, right in
            its distribution but no consistent function over the rows: for who needs mean and spread of each output
            alone, and the fastest.
        samples_at_once: how many samples are one batch. Default: as many as make an input of at most 2**24 numbers. 1
            runs them one after another, for a model that does not treat dimension 0 as the batch.

    Returns:
        `Prediction`, with ``outputs`` of shape (num_samples, ...), without gradients.

    Raises:
        TypeError: the model does not return a tensor, or num_samples or samples_at_once is not an int.
        ValueError: num_samples or samples_at_once is below 1, there is no such estimator, the model has no Bayesian
            layer, the shape or dtype of its output depends on the draw, or, with several samples at once, a module is
            known to mix the batch or a shape shows that one does.
    """
    num_samples = check_count(num_samples, "num_samples")
    if estimator is not None:
        check_estimator(estimator)
    at_once = folding.samples_at_once(x, num_samples, samples_at_once)
    layers = _addresses(model)
    seed = draw_seed(next(next(iter(layers)).parameters()).device) if seed is None else as_seed(seed)
    was_training = [(module, module.training) for module in model.modules()]
    outputs: Tensor | None = None
    try:
        model.eval()
        if at_once > 1:
            folding.check_foldable(model)
        for begin in range(0, num_samples, at_once):
            now = min(at_once, num_samples - begin)
            frozen = _noise_of(_frozen(layers, seed, begin, estimator, each_sample=True))
            with frozen, folding.drawing(layers, now, x) as folded:
                output = model(folded)
            if not isinstance(output, Tensor):
                raise TypeError(f"the model must return a tensor, got {describe(output)}: wrap it to pick one out")
            each = [output] if now == 1 else folding.unfold(output, now, folding.batch_size(x))
            if outputs is None:
                outputs = output.new_empty((num_samples, *each[0].shape))
            if each[0].shape != outputs.shape[1:] or output.dtype != outputs.dtype:
                raise ValueError(
                    "the model's output must have one shape and dtype whatever the draw, got "
                    f"{describe(each[0])} after {describe(outputs[0])}"
                )
            # A copy: the model may write its next output over this one.
            torch.stack(each, out=outputs[begin : begin + now])
    finally:
        for module, training in was_training:
            module.training = training
    assert outputs is not None
    return Prediction(outputs, class_dim)


@contextlib.contextmanager
def frozen_sample(
    model: nn.Module, seed: int | Tensor, *, sample: int | Tensor = 0, estimator: Estimator | None = None
) -> Iterator[None]:
    """Within the context the Bayesian layers of `model` use one draw of their weights: one consistent function.

    The draw is a function of `seed`, `sample` and each layer's qualified name, not of call order: it is the same for
    every batch, in every process and after save and load. What the estimators "local" and "flipout" draw for each row
    is a function of the row's place in the batch besides. Tied layers draw the same weights. Contexts nest; the
    innermost counts. Compute gradients inside the context if activations are checkpointed, because their recomputation
    draws the weights again.

    Args:
        model: the module whose layers are frozen, with at least one Bayesian layer.
        seed: an int or a 0-d int64 tensor.
        sample: index of the Monte Carlo sample, an int in [0, 2**32) (default 0) or a 0-d int64 tensor.
        estimator: in place of the layers' own (default None): with "shared" one function of whatever rows, however the
            layers were trained.

    Raises:
        TypeError, ValueError: `seed` or `sample` is not as above, there is no such estimator, or the model has no
            Bayesian layer.
    """
    if estimator is not None:
        check_estimator(estimator)
    with _noise_of(_frozen(_addresses(model), seed, sample, estimator)):
        yield


@contextlib.contextmanager
def mean_mode(model: nn.Module) -> Iterator[None]:
    """Within the context every Bayesian layer of `model` computes with its posterior means: no sampling.

    Contexts of this kind and of `frozen_sample` nest; the innermost counts. A model without Bayesian layers computes as
    ever.

    Raises:
        TypeError: `model` is not a module.
    """
    with _noise_of({layer: MeanWeights() for _, layer in bayes_modules(model)}):
        yield


@contextlib.contextmanager
def _noise_of(noise: dict[BayesModule, Any]) -> Iterator[None]:
    for layer, source in noise.items():
        layer._noises = (*layer._noises, source)
    try:
        yield
    finally:
        # Its own entry and no other: contexts may end in any order.
        for layer, source in noise.items():
            layer._noises = tuple(entry for entry in layer._noises if entry is not source)


def _frozen(
    layers: dict[BayesModule, dict[str, Address]],
    seed: int | Tensor,
    sample: int | Tensor,
    estimator: Estimator | None = None,
    each_sample: bool = False,
) -> dict[BayesModule, FrozenNoise]:
    devices = {layer: next(layer.parameters()).device for layer in layers}
    # One copy to each device, not to each layer: a copy waits for the device.
    keys = {device: (as_seed(seed, device), as_sample(sample, device)) for device in set(devices.values())}
    return {
        layer: FrozenNoise(*keys[devices[layer]], addresses, estimator, each_sample)
        for layer, addresses in layers.items()
    }


def _addresses(model: nn.Module) -> dict[BayesModule, dict[str, Address]]:
    """Where the noise of each Bayesian layer's random tensors lies; tied ones share the first owner's.

    A number, below 2^28, is the hash of a name, or the next free one where two collide.
    """
    taken: set[int] = set()

    def number(name: str) -> int:
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _LAYERS
        while number in taken:
            number = (number + 1) % _LAYERS
        taken.add(number)
        return number

    own: dict[tuple[BayesModule, str], Address] = {}
    for layer_name, layer in bayes_modules(model):
        # Two streams to a number, a weight's and its bias's; a layer with more tensors has more numbers.
        numbers: dict[int, int] = {}
        for name, (stream, *_) in layer.addresses.items():
            pair, role = divmod(stream, 8)
            if pair not in numbers:
                numbers[pair] = number(layer_name if pair == 0 else f"{layer_name}.{name}")
            own[layer, name] = Address(8 * numbers[pair] + role)
    if not own:
        raise ValueError("model has no Bayesian layer to draw: convert it with fusedbayes.to_bayesian")
    owners = {identity(layer, name): own[layer, name] for _, layer, name in variational_parameters(model)}
    addresses: dict[BayesModule, dict[str, Address]] = {}
    for layer, name in own:
        owner = owners.get(identity(layer, name), own[layer, name])
        addresses.setdefault(layer, {})[name] = owner
    return addresses
