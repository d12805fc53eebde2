"""A network of one implementation, ready to run: its parameters, its step, and the check of its answers."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fusedbayes as fb
from bench.cases import Case
from bench.implementations import SIGMA_INIT, Implementation
from fusedbayes import reference
from fusedbayes.reference import GaussianParameter

CHECK_DRAWS, NETWORK_CHECK_DRAWS = 16, 32


class WithKL(nn.Module):
    """Returns the output and the KL of a network, so that torch.compile sees both."""

    def __init__(self, network: nn.Module, kl: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.kl = kl

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(x), self.kl(self.network)


class Model:
    """The network of `case` in one implementation.

    Attributes:
        network: the module.
        layers: its Bayesian (or linear) layers, in the order in which they were made.
    """

    def __init__(self, implementation: Implementation, case: Case, device: str) -> None:
        self.implementation = implementation
        self.case = case
        self.device = device
        self.layers: list[nn.Module] = []

        def make(in_features: int, out_features: int) -> nn.Module:
            self.layers.append(implementation.make_layer(in_features, out_features))
            return self.layers[-1]

        with torch.device(device):
            # Some libraries ignore the default device.
            self.network = case.network.build(make).to(device)
        self.set_posterior(SIGMA_INIT)
        self.x = case.input(device)
        if case.group == "forward+backward":
            self.x.requires_grad_()
        self._prepare()

    def _prepare(self) -> None:
        forward: nn.Module = self.network
        with_kl = WithKL(self.network, self.implementation.kl) if self.implementation.kl else None
        if self.implementation.compiled:
            assert with_kl is not None
            # For these very shapes, and no silent way back to eager.
            forward = torch.compile(self.network, dynamic=False, fullgraph=True)
            with_kl = torch.compile(with_kl, dynamic=False, fullgraph=True)
        self._forward, self._with_kl = forward, with_kl
        self._elbo = fb.ELBO(self.network, _mean_square, num_data=1) if self.implementation.ours else None
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-4)

    @torch.no_grad()
    def set_posterior(self, sigma_ratio: float) -> None:
        """The same means for every implementation, and sigma = sigma_ratio / sqrt(in_features)."""
        generator = torch.Generator(self.device).manual_seed(0)
        for layer, (k, n) in zip(self.layers, self.case.network.layers, strict=True):
            scale = 1.0 / math.sqrt(k)
            names = self.implementation.parameters
            for i, shape in enumerate(((n, k), (n,))):
                mu = torch.empty(shape, device=self.device).uniform_(-scale, scale, generator=generator)
                if names is None:
                    (layer.weight, layer.bias)[i].copy_(mu)
                    continue
                sigma = torch.full(shape, sigma_ratio * scale, device=self.device)
                layer.get_parameter(names[2 * i]).copy_(mu)
                layer.get_parameter(names[2 * i + 1]).copy_(self.implementation.from_sigma(sigma))

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast to bfloat16 where the case asks for it."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.case.precision == "bf16"):
            yield

    def forward(self) -> Tensor:
        with torch.no_grad(), self.precision():
            return self._forward(self.x)

    def loss(self) -> tuple[Tensor, Tensor | None]:
        """The training loss, and the KL in it."""
        with self.precision():
            if self._elbo is not None:
                out = self._elbo(self.x, self.x)
                return out.loss, out.kl
            if self._with_kl is None:
                return _mean_square(self._forward(self.x), self.x), None
            y, kl = self._with_kl(self.x)
            return _mean_square(y, self.x) + kl, kl

    def forward_backward(self) -> tuple[Tensor | None, ...]:
        """Gradients of x and of every parameter."""
        loss, _ = self.loss()
        return torch.autograd.grad(loss, [self.x, *self.network.parameters()], allow_unused=True)

    @torch.no_grad()
    def forward_with_kl(self) -> Tensor:
        """The loss, of which the output's part is a mean square."""
        return self.loss()[0]

    def training_step(self) -> None:
        self.loss()[0].backward()
        self._optimizer.step()
        # Last, so that the next step allocates its gradients itself.
        self._optimizer.zero_grad()

    def prediction(self) -> Tensor:
        with torch.no_grad(), self.precision():
            if self._elbo is not None:
                return fb.predict(self.network, self.x, self.case.samples).outputs
            return torch.stack([self._forward(self.x) for _ in range(self.case.samples)])

    @property
    def run(self) -> Callable[[], object]:
        """What is timed."""
        steps: dict[str, Callable[[], object]] = {
            "forward": self.forward,
            "forward with KL": self.forward_with_kl,
            "forward+backward": self.forward_backward,
            "training step": self.training_step,
            "prediction": self.prediction,
        }
        return steps[self.case.group]

    def check(self, linear: "Model", eager: "Model") -> None:
        """Raises AssertionError unless mean, spread, KL and gradients are what the posterior says.

        Implementations draw different noise, so what is compared is the function and its gradients at sigma -> 0 with
        those of nn.Linear, the spread of the outputs with its exact value, or, of several layers, with that of the
        reference, and the KL with its formula.

        Args:
            linear, eager: the same case in nn.Linear and in the reference.
        """
        self.set_posterior(1e-6)
        # Relative to the norm. fp32: sums of a thousand products, 2^-24 sqrt(1000) each, over a few layers, and sigma
        # itself; bf16: 2^-9 an operand, over a few layers.
        tolerance = 2e-5 if self.case.precision == "fp32" else 2e-2
        mean = linear.forward().float()
        _assert_near(self.forward().float(), mean, tolerance, "the output at sigma -> 0")
        if self.case.trains and self.implementation.kl is not None:
            self._check_gradients(linear, tolerance)
        self.set_posterior(SIGMA_INIT)
        if self.implementation.kl is None:
            return
        if self.case.group == "prediction":
            outputs = self.prediction()
            assert outputs.shape == (self.case.samples, *mean.shape), f"outputs of shape {tuple(outputs.shape)}"
            distinct = len(outputs.flatten(1).unique(dim=0))
            assert distinct == self.case.samples, f"{distinct} distinct samples of {self.case.samples}"
        if len(self.layers) == 1:
            self._check_spread(mean)
        else:
            self._check_spread_of_network(mean, eager)
        if self.case.with_kl:
            _, kl = self.loss()
            assert kl is not None
            self._check_kl(kl.item())

    def _check_gradients(self, linear: "Model", tolerance: float) -> None:
        """dmu = dW of nn.Linear + mu / s0^2 at sigma -> 0; every parameter has a finite gradient."""
        names = self.implementation.parameters
        assert names is not None
        expected_grads = torch.autograd.grad(linear.loss()[0], list(linear.network.parameters()))
        by_parameter = dict(zip(map(id, linear.network.parameters()), expected_grads, strict=True))
        parameters = [layer.get_parameter(name) for layer in self.layers for name in names]
        grads = torch.autograd.grad(self.loss()[0], parameters)
        for index, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
            layer, kind = divmod(index, 4)
            assert grad.isfinite().all(), f"a gradient of {names[kind]} is not finite"
            # A sampled KL has gradients of its own noise, 1 / sigma.
            if kind % 2 == 1 or self.implementation.kl_is_sampled:
                continue
            weight = (linear.layers[layer].weight, linear.layers[layer].bias)[kind // 2]
            of_kl = parameter.detach() * self.case.network.layers[layer][0]  # mu / s0^2, s0^2 = 1 / in_features
            if self.implementation.kl_is_mean:
                of_kl = of_kl / parameter.numel()
            _assert_near(grad, by_parameter[id(weight)] + of_kl, tolerance, f"the gradient of {names[kind]}")

    def _check_spread(self, mean: Tensor) -> None:
        (k, _) = self.case.network.layers[0]
        variance = (SIGMA_INIT**2 / k) * (self.x.detach().square().sum(-1, keepdim=True) + 1.0)
        deviations = torch.stack([self.forward().float() - mean for _ in range(CHECK_DRAWS)])
        ratio = (deviations.square() / variance).mean().item()
        # Each draw has 1024 and more independent outputs: 5 standard errors of a mean of squares, sqrt(2 / n). The
        # rounding of 16-bit operands adds a variance of its own.
        slack = 5 * math.sqrt(2 / (CHECK_DRAWS * deviations.shape[-1])) + (
            0.0 if self.case.precision == "fp32" else 0.02
        )
        assert abs(ratio - 1.0) <= slack, f"the outputs' variance is {ratio:.4f} of what it should be"

    def _check_spread_of_network(self, mean: Tensor, eager: "Model") -> None:
        """The distance from the means' output, squared, against the reference's: 5 standard errors of its mean."""
        distances = [
            torch.stack([(model.forward().float() - mean).square().sum() for _ in range(NETWORK_CHECK_DRAWS)]).double()
            for model in (self, eager)
        ]
        error = math.sqrt(sum(d.var().item() for d in distances) / NETWORK_CHECK_DRAWS)
        ours, theirs = (d.mean().item() for d in distances)
        assert abs(ours - theirs) <= 5 * error, (
            f"the outputs' variance is {ours / theirs:.2f} of what it should be, give or take {error / theirs:.2f}"
        )

    def _check_kl(self, kl: float) -> None:
        names = self.implementation.parameters
        assert names is not None
        expected, weights = 0.0, 0
        for layer, (k, _) in zip(self.layers, self.case.network.layers, strict=True):
            scale = torch.tensor(1.0 / math.sqrt(k), dtype=torch.float64, device=self.device)
            for name in names[::2]:
                mu = layer.get_parameter(name).detach().double()
                rho = reference.rho_from_sigma(SIGMA_INIT * scale).expand_as(mu)
                terms = reference.weight_kl(GaussianParameter(mu, rho, torch.zeros_like(scale), scale)).item()
                expected += terms / mu.numel() if self.implementation.kl_is_mean else terms
                weights += mu.numel()
        # A weight's terms are log(s0 / sigma), about 2, and squares below 1, with a few roundings of 2^-24, and sigma
        # is rounded on its way through rho: 2^-20 in all. A single-sample estimate's terms deviate by less than 1.
        slack = 6 * math.sqrt(weights) if self.implementation.kl_is_sampled else 2.0**-20 * expected
        assert abs(kl - expected) <= slack, f"the KL is {kl}, and should be {expected}"


def _mean_square(output: Tensor, _: Tensor) -> Tensor:
    return output.float().square().mean()


def _assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= tolerance, f"{what} is off by {error:.1e}, allowed {tolerance:.0e}"
