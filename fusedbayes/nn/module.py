"""What every Bayesian layer is: its construction, initialisation and conversion from and to what it replaces."""

import math
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fusedbayes.checks import check_number, describe
from fusedbayes.nn.drawing import DrawnTensors
from fusedbayes.nn.prior import configuration
from fusedbayes.nn.random_tensor import RandomTensor
from fusedbayes.noise import Address
from fusedbayes.priors import Prior
from fusedbayes.reference import Estimator

Layer = TypeVar("Layer", bound="BayesModule")


class BayesModule(DrawnTensors):
    """Base class of the Bayesian layers: a module of the class `replaces` whose parameters are random.

    A random tensor `name` has the parameters ``{name}_mu`` and ``{name}_rho``, sigma = softplus(rho), and the prior in
    the buffers ``{name}_prior_mu`` and ``{name}_prior_sigma``: 0-d for a scalar prior, else of the tensor's shape. One
    that is not Normal is the child module ``{name}_prior`` instead. Where weights were pruned (`set_pruned`), the mask
    is the buffer ``{name}_pruned``. All of it is in the state_dict. ``{name}`` itself tells its shape, dtype and
    device, but holds no values: see `fusedbayes.nn.RandomTensor`. The layer samples in training and evaluation mode
    alike; `fusedbayes.frozen_sample` and `fusedbayes.mean_mode` change that for a while. The KL costs nothing unless it
    is asked for (`fusedbayes.kl_loss`, `fusedbayes.ELBO`).

    Args:
        *args, **kwargs: those of the class that is replaced.
        prior_mu: mean of the prior of every random tensor (default 0).
        prior_sigma: its standard deviation; None (default) means 1 / sqrt(fan_in), so that the outputs of a layer keep
            their scale under the prior however wide it is.
        prior: in their place, a prior of any kind (`fusedbayes.priors`), of which each random tensor gets a copy
            (default None).
        sigma_init: initial standard deviation of the posterior; None (default) means 0.1 / sqrt(fan_in).
        estimator: how the output is sampled, one of `estimators`. "shared" (default): one draw of the weights for the
            whole batch. "local": each row's outputs from their own distribution, with less noise in the gradients.
            "flipout": one draw, decorrelated between the rows. See docs/estimators.md. May be assigned later;
            parameters and state_dict do not depend on it.

    Attributes:
        replaces: the deterministic class.
        estimators: those that the layer knows; where `fusedbayes.predict` asks for another, it draws "shared".
        random_tensors: names of the parameters of `replaces`, all random here.
        fan_in: number of inputs that an output adds up.
        addresses: of the random tensors' noise in a layer by itself.

    Raises:
        TypeError: a scale is not a number, or dtype not floating-point; and what the replaced class raises.
        ValueError: a standard deviation or the estimator is out of its range, or a prior is given twice; and what the
            replaced class raises.
    """

    replaces: ClassVar[type[nn.Module]]
    random_tensors: tuple[str, ...] = ("weight", "bias")
    # Attributes of `replaces` that hold its parameters again, which a Bayesian layer has not.
    derived_attributes: ClassVar[frozenset[str]] = frozenset()
    # Children of `replaces` whose weights the layer draws, and what they become along with it.
    parts: ClassVar[dict[str, type["BayesModule"]]] = {}

    # What a Bayesian layer has beyond the attributes of the class that it replaces.
    own_attributes: ClassVar[frozenset[str]] = frozenset(
        {
            *DrawnTensors.TRANSIENT,
            *DrawnTensors.PRIOR_ATTRIBUTES,
            "sigma_init",
            "_estimator",
            "random_tensors",
            "addresses",
        }
    )

    def __init__(
        self,
        *args: Any,
        prior_mu: float = 0.0,
        prior_sigma: float | None = None,
        prior: Prior | None = None,
        sigma_init: float | None = None,
        estimator: Estimator = "shared",
        **kwargs: Any,
    ) -> None:
        dtype = kwargs.get("dtype")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {describe(dtype)}")
        device = kwargs.pop("device", None)
        device = torch.get_default_device() if device is None else device
        # On meta first: nothing is drawn before everything is checked.
        self._become(self._blank(*args, **kwargs), prior_mu, prior_sigma, sigma_init, estimator, prior)
        self.to_empty(device=device)
        self.reset_parameters()

    @classmethod
    def _blank(cls, *args: Any, **kwargs: Any) -> nn.Module:
        """A module of the class `replaces` with these arguments, on the meta device."""
        return cls.replaces(*args, device="meta", **kwargs)

    @classmethod
    def of(
        cls: type[Layer],
        deterministic: nn.Module,
        *,
        prior_mu: float = 0.0,
        prior_sigma: float | None = None,
        prior: Prior | None = None,
        sigma_init: float | None = None,
        estimator: Estimator = "shared",
    ) -> Layer:
        """The Bayesian counterpart of a module of the class `replaces`, whose parameters *are* its means.

        Options and errors are those of the constructor.

        Raises:
            TypeError: `deterministic` is of another class.
        """
        if type(deterministic) is not cls.replaces:
            kind = type(deterministic).__name__
            raise TypeError(f"deterministic must be of the class that {cls.__name__} replaces, got a {kind}")
        layer = cls.__new__(cls)
        layer._become(deterministic, prior_mu, prior_sigma, sigma_init, estimator, prior)
        layer._reset_sigmas_and_priors()
        return layer

    def _become(
        self,
        deterministic: nn.Module,
        prior_mu: float,
        prior_sigma: float | None,
        sigma_init: float | None,
        estimator: Estimator,
        prior: Prior | None = None,
    ) -> None:
        nn.Module.__init__(self)
        vars(self).update(self.TRANSIENT)
        held_again = self.derived_attributes
        vars(self).update({k: v for k, v in configuration(deterministic).items() if k not in held_again})
        scale = 1.0 / math.sqrt(self.fan_in)
        self._take_prior(prior, prior_mu, prior_sigma, scale)
        self.sigma_init = check_number(0.1 * scale if sigma_init is None else sigma_init, "sigma_init", positive=True)
        self.estimator = estimator
        self.random_tensors = self.tensors_of(deterministic)
        # Streams in pairs, a weight's and its bias's, as `fusedbayes.noise.Role` numbers them.
        self.addresses = {name: Address(8 * (i // 2) + i % 2) for i, name in enumerate(self.random_tensors)}
        for name in self.random_tensors:
            mean = deterministic._parameters[name]
            self.register_parameter(f"{name}_mu", mean)
            rho = None if mean is None else nn.Parameter(torch.empty_like(mean), mean.requires_grad)
            self.register_parameter(f"{name}_rho", rho)
            for part in ("prior_mu", "prior_sigma"):
                self.register_buffer(f"{name}_{part}", None if mean is None else mean.new_empty(()))
        for name, kind in self.parts.items():
            child = deterministic.get_submodule(name)
            made = kind.__new__(kind)
            made._become(child, prior_mu, prior_sigma, sigma_init, "shared", prior)
            self.add_module(name, made.train(child.training))

    @classmethod
    def tensors_of(cls, deterministic: nn.Module) -> tuple[str, ...]:
        """The names of the parameters that a module of the class `replaces` has, None among them."""
        return cls.random_tensors

    @property
    def fan_in(self) -> int:
        raise NotImplementedError

    def deterministic(self) -> nn.Module:
        """A module of the class `replaces` that computes with the means: its parameters are these, not copies."""
        module = self.replaces.__new__(self.replaces)
        nn.Module.__init__(module)
        vars(module).update({k: v for k, v in configuration(self).items() if k not in self.own_attributes})
        for name in self.random_tensors:
            mean, pruned = self._tensor(f"{name}_mu"), self.pruned(name)
            if pruned is not None:  # what an optimizer may have made of weights that no forward sees
                mean.data.masked_fill_(pruned, 0.0)
            module.register_parameter(name, mean)
        for name in self.parts:
            part: Any = self.get_submodule(name)
            module.add_module(name, part.deterministic())
        return module.train(self.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the means as the replaced class draws its parameters; sets sigma and priors to the constructor's.

        No weight is pruned afterwards.
        """
        self._reset_sigmas_and_priors()
        self._draw_means()

    def _draw_means(self) -> None:
        """Draws the means, and those of `parts`."""
        module: Any = self.deterministic()
        module.reset_parameters()

    @torch.no_grad()
    def _reset_sigmas_and_priors(self) -> None:
        for name in self.names():
            self._buffers.pop(f"{name}_pruned", None)
            self._reset_prior(name)
            self._hold_sigma(name, self.sigma_init, "sigma_init")
        for name in self.parts:
            part: Any = self.get_submodule(name)
            part._reset_sigmas_and_priors()

    def __getattr__(self, name: str) -> Any:
        if name not in self.random_tensors:
            return super().__getattr__(name)
        mu = self._tensor(f"{name}_mu")
        return None if mu is None else RandomTensor(type(self).__name__, name, mu)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.random_tensors:
            # As a parameter of its own it would take part in nothing.
            raise AttributeError(f"{name!r} of {type(self).__name__} is random: assign {name}_mu and {name}_rho")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        parts = (self._arguments_repr(), self._prior_repr(), f"estimator={self.estimator!r}")
        return ", ".join(filter(None, parts))

    def _arguments_repr(self) -> str:
        return self.replaces.extra_repr(self)
