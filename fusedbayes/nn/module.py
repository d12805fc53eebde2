"""What every Bayesian layer shares: random tensors and their priors, initialisation, the KL, where noise comes from."""

import math
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fusedbayes import functional, reference
from fusedbayes.arguments import check_estimator
from fusedbayes.checks import check_number, describe
from fusedbayes.nn.context import Draw, Fold, FrozenNoise, FusedKL, MeanWeights
from fusedbayes.nn.random_tensor import RandomTensor
from fusedbayes.noise import Address, draw_seed
from fusedbayes.reference import ESTIMATORS, Estimator, GaussianParameter

Layer = TypeVar("Layer", bound="BayesModule")

# What every module has, whatever its class.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class BayesModule(nn.Module):
    """Base class of the Bayesian layers: a module of the class `replaces` whose parameters are random.

    A random tensor `name` has the parameters ``{name}_mu`` and ``{name}_rho``, sigma = softplus(rho), and the prior in
    the buffers ``{name}_prior_mu`` and ``{name}_prior_sigma``: 0-d for a scalar prior, else of the tensor's shape. All
    four are in the state_dict. ``{name}`` itself tells its shape, dtype and device, but holds no values: see
    `fusedbayes.nn.RandomTensor`. The layer samples in training and evaluation mode alike; `fusedbayes.frozen_sample`
    and `fusedbayes.mean_mode` change that for a while. The KL costs nothing unless it is asked for
    (`fusedbayes.kl_loss`, `fusedbayes.ELBO`).

    Args:
        *args, **kwargs: those of the class that is replaced.
        prior_mu: mean of the prior of every random tensor (default 0).
        prior_sigma: its standard deviation; None (default) means 1 / sqrt(fan_in), so that the outputs of a layer keep
            their scale under the prior however wide it is.
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
        ValueError: a standard deviation or the estimator is out of its range; and what the replaced class raises.
    """

    replaces: ClassVar[type[nn.Module]]
    estimators: ClassVar[tuple[Estimator, ...]] = ESTIMATORS
    random_tensors: tuple[str, ...] = ("weight", "bias")
    # Attributes of `replaces` that hold its parameters again, which a Bayesian layer has not.
    derived_attributes: ClassVar[frozenset[str]] = frozenset()
    # Children of `replaces` whose weights the layer draws, and what they become along with it.
    parts: ClassVar[dict[str, type["BayesModule"]]] = {}

    # Set for a while by the context managers of `fusedbayes.predict` and `fusedbayes.objective`; neither copied nor
    # saved. In the instance's __dict__ from the start: torch.compile guards on what is there. What changes at each step
    # is written there too, past torch.nn.Module.__setattr__, which first looks for a parameter or module to register.
    _noises: tuple[FrozenNoise | MeanWeights, ...]  # of the contexts that are open; the last one counts
    _fold: Fold | None
    _recalls: tuple[Fold, ...]  # of forwards whose backward pass is running and may repeat them for a checkpoint
    _kl_wanted: bool
    _kl_of_forward: FusedKL | None
    _TRANSIENT: ClassVar[dict[str, Any]] = {
        "_noises": (),
        "_fold": None,
        "_recalls": (),
        "_kl_wanted": False,
        "_kl_of_forward": None,
    }
    # What a Bayesian layer has beyond the attributes of the class that it replaces.
    own_attributes: ClassVar[frozenset[str]] = frozenset(
        {*_TRANSIENT, "prior_mu", "prior_sigma", "sigma_init", "_estimator", "random_tensors", "addresses"}
    )

    def __init__(
        self,
        *args: Any,
        prior_mu: float = 0.0,
        prior_sigma: float | None = None,
        sigma_init: float | None = None,
        estimator: Estimator = "shared",
        **kwargs: Any,
    ) -> None:
        dtype = kwargs.get("dtype")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {describe(dtype)}")
        device = kwargs.pop("device", None)
        device = torch.get_default_device() if device is None else device
        # Nothing is drawn before everything is checked.
        self._become(self._blank(*args, **kwargs), prior_mu, prior_sigma, sigma_init, estimator)
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
        sigma_init: float | None = None,
        estimator: Estimator = "shared",
    ) -> Layer:
        """The Bayesian counterpart of a module of the class `replaces`, whose parameters *are* its means."""
        layer = cls.__new__(cls)
        layer._become(deterministic, prior_mu, prior_sigma, sigma_init, estimator)
        return layer

    def _become(
        self,
        deterministic: nn.Module,
        prior_mu: float,
        prior_sigma: float | None,
        sigma_init: float | None,
        estimator: Estimator,
    ) -> None:
        nn.Module.__init__(self)
        vars(self).update(self._TRANSIENT)
        held_again = self.derived_attributes
        vars(self).update({k: v for k, v in configuration(deterministic).items() if k not in held_again})
        scale = 1.0 / math.sqrt(self.fan_in)
        self.prior_mu = check_number(prior_mu, "prior_mu")
        self.prior_sigma = check_number(scale if prior_sigma is None else prior_sigma, "prior_sigma", positive=True)
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
        self._reset_sigmas_and_priors()
        for name, kind in self.parts.items():
            child = deterministic.get_submodule(name)
            made = kind.of(child, prior_mu=prior_mu, prior_sigma=prior_sigma, sigma_init=sigma_init)
            self.add_module(name, made.train(child.training))

    @classmethod
    def tensors_of(cls, deterministic: nn.Module) -> tuple[str, ...]:
        """The names of the parameters that a module of the class `replaces` has, None among them."""
        return cls.random_tensors

    @property
    def fan_in(self) -> int:
        raise NotImplementedError

    @property
    def draws_all(self) -> bool:
        """Whether every element of the random tensors is random."""
        return True

    @property
    def batched_dims(self) -> int:
        """Dimensions that an input has at least if the first of them is the batch."""
        return 2

    @property
    def estimator(self) -> Estimator:
        """How the output is sampled, one of `estimators`."""
        return self._estimator

    @estimator.setter
    def estimator(self, value: Estimator) -> None:
        check_estimator(value, self.estimators)
        self._estimator = value

    def deterministic(self) -> nn.Module:
        """A module of the class `replaces` that computes with the means: its parameters are these, not copies."""
        module = self.replaces.__new__(self.replaces)
        nn.Module.__init__(module)
        vars(module).update({k: v for k, v in configuration(self).items() if k not in self.own_attributes})
        for name in self.random_tensors:
            module.register_parameter(name, self._tensor(f"{name}_mu"))
        for name in self.parts:
            part: Any = self.get_submodule(name)
            module.add_module(name, part.deterministic())
        return module.train(self.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the means as the replaced class draws its parameters; sets sigma and priors to the constructor's."""
        module: Any = self.deterministic()
        module.reset_parameters()
        self._reset_sigmas_and_priors()

    @torch.no_grad()
    def _reset_sigmas_and_priors(self) -> None:
        for name in self.names():
            self._fill_prior(name, self.prior_mu, self.prior_sigma)
            self.set_sigma(self.sigma_init, name)

    @property
    def is_held(self) -> bool:
        """Whether `fusedbayes.frozen_sample` or `fusedbayes.mean_mode` decides at present what the layer draws."""
        return bool(self._noises)

    def _draw(self, input: Tensor) -> Draw | None:
        """What a forward of this input draws; None if every weight is its mean."""
        noise = self._noises[-1] if self._noises else None
        if isinstance(noise, MeanWeights):
            return None
        num_samples = self._samples_in(input)
        if noise is None:
            return Draw(None, None, self.addresses, self._estimator, num_samples)
        estimator = noise.estimator or self._estimator
        return Draw(
            noise.seed,
            noise.sample,
            noise.addresses,
            estimator if estimator in self.estimators else "shared",
            num_samples if noise.each_sample else 1,  # else one function for all rows
        )

    def _sampled(self, draw: Draw, index: int = 0) -> dict[str, Tensor]:
        """Every random tensor of the layer, drawn for the Monte Carlo sample of this index in the dtype of products.

        Gives the KL too, in the same pass, where one is wanted.
        """
        with_kl, drawn, kls = self._charges(), {}, []
        for name in self.names():
            mu, rho = self.posterior(name)
            drawn[name], kl = functional.sample_weight(
                mu,
                rho,
                prior=self.prior(name),  # with the KL or without: a checkpoint has to find the same tensors saved
                with_kl=with_kl,
                seed=draw.seed,
                sample=draw.sample_of(index),
                address=draw.addresses[name],
                dtype=product_dtype(mu),
            )
            kls += [] if kl is None else [kl]
        if with_kl:
            self._record_kl(torch.stack(kls).sum())
        return drawn

    def _means(self) -> dict[str, Tensor]:
        """The mean of every random tensor of the layer."""
        return {name: self._tensor(f"{name}_mu") for name in self.names()}

    def _seeded(self, draw: Draw) -> Draw:
        """The same with a seed, which all tensors and samples of one forward share."""
        if draw.seed is not None:
            return draw
        device = self.posterior(self.names()[0])[0].device
        return draw._replace(seed=draw_seed(device))

    def _charges(self) -> bool:
        """Whether this forward is to give the KL."""
        return self._kl_wanted and self._kl_of_forward is None

    def _record_kl(self, kl: Tensor) -> None:
        parameters = tuple(tensor for name in self.names() for tensor in self.posterior(name))
        vars(self)["_kl_of_forward"] = FusedKL(kl, parameters, tuple(p.requires_grad for p in parameters))

    def _samples_in(self, input: Tensor) -> int:
        """For how many Monte Carlo samples the input of this forward holds rows."""
        is_batch = isinstance(input, Tensor) and input.dim() >= self.batched_dims
        fold, rows = self._fold, input.size(0) if is_batch else 0  # a nested tensor has a size, but no shape
        if fold is None and not torch.compiler.is_compiling() and self._recalls:
            fold = self._recalled(rows)
        if fold is None or fold.num_samples == 1 or not isinstance(input, Tensor):
            return 1
        if not is_batch or not fold.holds(rows):
            raise ValueError(
                f"the model runs {fold.num_samples} Monte Carlo samples of a batch of {fold.batch} as one along "
                f"dimension 0, but {type(self).__name__} got {tuple(input.shape)}, whose dimension 0 is no batch, or "
                f"no multiple of {fold.num_samples * fold.batch}: pass samples_at_once=1 to run them one by one"
            )
        return fold.num_samples

    def _recalled(self, rows: int) -> Fold | None:
        if torch._C._current_graph_task_id() == -1:
            vars(self)["_recalls"] = ()  # left by a backward pass that failed
            return None
        folds = {fold for fold in self._recalls if fold.holds(rows)}
        if len(folds) > 1:
            raise RuntimeError(
                "one backward pass repeats checkpointed forwards of different numbers of Monte Carlo samples: pass "
                "samples_at_once=1, or differentiate the losses one by one"
            )
        return folds.pop() if folds else None

    def names(self) -> list[str]:
        """The random tensors that the layer has: without a bias, "bias" is not among them."""
        return [name for name in self.random_tensors if self._tensor(f"{name}_mu") is not None]

    def gaussian(self, name: str) -> GaussianParameter:
        """mu, rho, prior_mu and prior_sigma of the random tensor `name`."""
        return GaussianParameter(*self.posterior(name), *self.prior(name))

    def posterior(self, name: str) -> tuple[Tensor, Tensor]:
        """mu and rho of the random tensor `name`."""
        return self._tensor(f"{name}_mu"), self._tensor(f"{name}_rho")

    def prior(self, name: str) -> tuple[Tensor, Tensor]:
        """prior_mu and prior_sigma of the random tensor `name`."""
        return self._tensor(f"{name}_prior_mu"), self._tensor(f"{name}_prior_sigma")

    def _tensor(self, attribute: str) -> Any:
        # From where torch.nn.Module keeps it: its own way there takes several times as long. A parametrized tensor is
        # not kept, but computed by a property.
        for held in (self._parameters, self._buffers):
            if attribute in held:
                return held[attribute]
        return getattr(self, attribute)

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

    def kl_loss(self) -> Tensor:
        """KL of the posterior from the prior, summed over the layer's parameters; see `fusedbayes.kl_loss`.

        Returns:
            0-d float32 tensor (float64 for float64 parameters) in nats, differentiable.
        """
        return torch.stack([self.kl_of(name) for name in self.names()]).sum()

    def kl_of(self, name: str) -> Tensor:
        """The KL of one random tensor, 0-d."""
        parameter = self.gaussian(name)
        return functional.weight_kl(parameter.mu, parameter.rho, (parameter.prior_mu, parameter.prior_sigma))

    @torch.no_grad()
    def set_prior(self, mu: float | Tensor, sigma: float | Tensor, name: str = "weight") -> None:
        """Sets the prior N(mu, sigma^2) of one random tensor, by copy.

        Layers with tied weights are charged with the prior of the first of them: set it there.

        Args:
            mu, sigma: numbers, or tensors of the parameter's shape; sigma is a standard deviation > 0.
            name: of the random tensor, "weight" (default) or "bias".

        Raises:
            TypeError: `mu` or `sigma` is neither a number nor a floating-point tensor.
            ValueError: no such random tensor, a shape that is neither () nor the parameter's, or a sigma that is not
                positive and finite.
        """
        if name not in self.names():
            raise ValueError(f"name must be one of {', '.join(map(repr, self.names()))}, got {name!r}")
        like = self.gaussian(name).mu
        for part, value, positive in (("prior_mu", mu, False), ("prior_sigma", sigma, True)):
            if not isinstance(value, Tensor):
                check_number(value, part, positive=positive)
                continue
            if not value.is_floating_point():
                raise TypeError(f"{part} must be a number or a floating-point tensor, got {describe(value)}")
            if value.shape not in ((), like.shape):
                raise ValueError(f"{part} must have shape () or {tuple(like.shape)}, got {tuple(value.shape)}")
            rounded = value.to(like.dtype)
            if not torch.isfinite(rounded).all() or (positive and not (rounded > 0).all()):
                raise ValueError(
                    f"{part} must be finite{' and positive' if positive else ''} in {like.dtype}, got {value}"
                )
        self._fill_prior(name, mu, sigma)

    def _fill_prior(self, name: str, mu: float | Tensor, sigma: float | Tensor) -> None:
        like = self.gaussian(name).mu
        check_fits(mu, "prior_mu", like.dtype, -torch.finfo(like.dtype).max)
        check_fits(sigma, "prior_sigma", like.dtype, torch.finfo(like.dtype).tiny)
        for part, value in (("prior_mu", mu), ("prior_sigma", sigma)):
            # A copy: a prior that shared storage with mu would move with it. Never an inference tensor: training
            # could not save it for the backward pass.
            with torch.inference_mode(False):
                new = value.detach().to(like, copy=True) if isinstance(value, Tensor) else like.new_full((), value)
            setattr(self, f"{name}_{part}", new)

    @torch.no_grad()
    def set_sigma(self, sigma: float | Tensor, name: str = "weight") -> None:
        """Sets the posterior's standard deviation of one random tensor.

        Args:
            sigma: a number > 0, or a tensor of the parameter's shape.
            name: of the random tensor (default "weight").
        """
        _, rho = self.posterior(name)
        check_fits(sigma, "sigma_init", rho.dtype, 0.0)
        if rho.is_meta:
            return  # arithmetic without data has torch import its compiler, and Triton with it
        if not isinstance(sigma, Tensor):
            sigma = torch.full((), sigma, device=rho.device)
        rho.copy_(reference.rho_from_sigma(sigma.to(reference.compute_dtype(rho))))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint may hold a scalar prior or one value per weight; the buffer takes the checkpoint's form.
        for name in self.names():
            for part in ("prior_mu", "prior_sigma"):
                saved, buffer = state_dict.get(f"{prefix}{name}_{part}"), getattr(self, f"{name}_{part}")
                shapes = ((), getattr(self, f"{name}_mu").shape)
                if isinstance(saved, Tensor) and saved.shape in shapes and saved.shape != buffer.shape:
                    with torch.inference_mode(False):
                        setattr(self, f"{name}_{part}", buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._TRANSIENT}

    def extra_repr(self) -> str:
        own = f"{self._prior_repr()}, estimator={self.estimator!r}"
        return ", ".join(filter(None, (self._arguments_repr(), own)))

    def _arguments_repr(self) -> str:
        return self.replaces.extra_repr(self)

    def _prior_repr(self) -> str:
        """N(mu, sigma) of the first random tensor's prior, or that it is given per weight."""
        _, _, mu, sigma = self.gaussian(self.names()[0])
        if mu.is_meta:
            return "prior=meta"
        values = [f"{t.item():.4g}" if t.dim() == 0 else "per weight" for t in (mu, sigma)]
        return f"prior_mu={values[0]}, prior_sigma={values[1]}"


def configuration(module: nn.Module) -> dict[str, Any]:
    """The attributes of `module` that its class, or whoever else, added to those of every module."""
    return {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}


def product_dtype(mu: Tensor) -> torch.dtype:
    """The dtype in which products with a sample of `mu` are computed: autocast's, if it is on."""
    kind = mu.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and mu.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return mu.dtype


def check_fits(value: float | Tensor, name: str, dtype: torch.dtype, least: float) -> None:
    """Raises ValueError unless the number `value` lies between `least` and the largest number of `dtype`."""
    most = torch.finfo(dtype).max
    if not isinstance(value, Tensor) and not least <= value <= most:
        raise ValueError(f"{name} must lie in [{least:.4g}, {most:.4g}] for {dtype}, got {value}")
