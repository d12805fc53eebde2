"""What a forward of a Bayesian layer draws: of which noise, by which estimator, for how many Monte Carlo samples."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedbayes import functional
from fusedbayes.arguments import check_estimator
from fusedbayes.nn.context import Draw, Fold, FrozenNoise, FusedKL, MeanWeights
from fusedbayes.nn.prior import RandomTensors
from fusedbayes.noise import Address, draw_seed
from fusedbayes.reference import ESTIMATORS, Estimator


class DrawnTensors(RandomTensors):
    """A module whose forward draws its random tensors, as the contexts say that are open, and gives their KL if asked.

    Attributes:
        estimators: those that the layer knows; where `fusedbayes.predict` asks for another, it draws "shared".
        addresses: of the random tensors' noise in a layer by itself.
    """

    estimators: ClassVar[tuple[Estimator, ...]] = ESTIMATORS
    addresses: dict[str, Address]
    _estimator: Estimator

    # Set for a while by the context managers of `fusedbayes.predict` and `fusedbayes.objective`; neither copied nor
    # saved. In the instance's __dict__ from the start: torch.compile guards on what is there. What changes at each step
    # is written there too, past torch.nn.Module.__setattr__, which first looks for a parameter or module to register.
    _noises: tuple[FrozenNoise | MeanWeights, ...]  # of the contexts that are open; the last one counts
    _fold: Fold | None
    _recalls: tuple[Fold, ...]  # of forwards whose backward pass is running and may repeat them for a checkpoint
    _kl_wanted: bool
    _kl_of_forward: FusedKL | None
    TRANSIENT: ClassVar[dict[str, Any]] = {
        "_noises": (),
        "_fold": None,
        "_recalls": (),
        "_kl_wanted": False,
        "_kl_of_forward": None,
    }

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
        with_kl, is_normal, drawn, kls = self._charges(), not self.prior_modules(), {}, []
        for name in self.names():
            mu, rho = self.posterior(name)
            drawn[name], kl = functional.sample_weight(
                mu,
                rho,
                # With the KL or without: a checkpoint has to find the same tensors saved.
                prior=self.prior(name) if is_normal else None,
                with_kl=with_kl,
                seed=draw.seed,
                sample=draw.sample_of(index),
                address=draw.addresses[name],
                dtype=product_dtype(mu),
            )
            kls += [] if kl is None else [kl]
        if with_kl:
            self._record_kl(torch.stack(kls).sum(), self.posteriors())
        return drawn

    def _means(self) -> dict[str, Tensor]:
        """The mean of every random tensor of the layer."""
        return {name: self.posterior(name)[0] for name in self.names()}

    def _seeded(self, draw: Draw) -> Draw:
        """The same with a seed, which all tensors and samples of one forward share."""
        if draw.seed is not None:
            return draw
        return draw._replace(seed=draw_seed(self._tensor(f"{self.names()[0]}_mu").device))

    def _charges(self) -> bool:
        """Whether this forward is to give the KL: where a prior is not Normal, or weights are pruned, `kl_of` does."""
        return self._kl_wanted and self._kl_of_forward is None and self.has_fused_kl()

    def _record_kl(self, kl: Tensor, parameters: list[Tensor]) -> None:
        """Keeps the KL, and the mu and rho that it is of."""
        vars(self)["_kl_of_forward"] = FusedKL(kl, parameters, [p.requires_grad for p in parameters])

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

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self.TRANSIENT}


def product_dtype(mu: Tensor) -> torch.dtype:
    """The dtype in which products with a sample of `mu` are computed: autocast's, if it is on."""
    kind = mu.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and mu.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return mu.dtype
