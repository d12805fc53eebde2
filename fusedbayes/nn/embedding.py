"""The Bayesian counterpart of torch.nn.Embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedbayes import functional, reference
from fusedbayes.nn.context import Draw
from fusedbayes.nn.module import BayesModule
from fusedbayes.noise import Role


class BayesEmbedding(BayesModule):
    """A table of random rows, of which a forward draws those that it looks up: replaces `torch.nn.Embedding`.

    A row is mu + sigma * eps. "shared": one draw of the table, so that a row is the same however often it is looked up.
    "local": each lookup has a draw of its own. "flipout": one draw of the table, and for each lookup random signs of
    what it adds to the mean. Nothing of the table's size is computed but its KL, and gradients that are not sparse.

    Arguments, shapes and errors are those of `torch.nn.Embedding` and of `BayesModule`, whose default scales are 1 for
    the prior and 0.1 for the posterior here: a row is looked up, not added up. The row of `padding_idx` is not random:
    it is its mean, without a gradient or a KL (unless an output layer shares the table, which draws all of it).
    `max_norm` bounds the means, in place as torch does, not what is drawn of them. Gradients of mu and rho are sparse
    under `sparse` and scaled under `scale_grad_by_freq`; the KL's are dense.

    Where several Monte Carlo samples run as one batch, an input of a single row, such as positions of shape (1,
    tokens), stands for a batch of equal rows.
    """

    replaces = nn.Embedding
    random_tensors = ("weight",)

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    @property
    def draws_all(self) -> bool:
        return self.padding_idx is None

    @property
    def batched_dims(self) -> int:
        return 1

    @property
    def fan_in(self) -> int:
        return 1

    def forward(self, input: Tensor) -> Tensor:
        fold = self._fold
        if fold is None or fold.num_samples == 1 or input.dim() < 2 or input.shape[0] != 1 or fold.holds(1):
            return self._look_up(input, self._draw(input))
        # Once for each sample, then for each row of its batch.
        rows = input.expand(fold.num_samples * fold.batch, *input.shape[1:])
        draw = self._draw(rows)
        if draw is None or draw.num_samples == 1:
            return self._look_up(input, draw)
        return self._look_up(rows[:: fold.batch], draw).repeat_interleave(fold.batch, 0)

    def _look_up(self, input: Tensor, draw: Draw | None) -> Tensor:
        mean, rho = self._rows(input)
        if draw is None:
            return mean
        draw = self._seeded(draw)
        dtype = reference.compute_dtype(mean)
        shape = draw.num_samples, input.numel() // draw.num_samples, self.embedding_dim
        eps = torch.stack([self._eps(rows, draw, index, dtype) for index, rows in enumerate(input.reshape(shape[:2]))])
        deviation = reference.sigma_from_rho(rho.to(dtype)) * eps.view(mean.shape)
        if self.padding_idx is not None:
            deviation = deviation.masked_fill((input == self.padding_idx).unsqueeze(-1), 0.0)
        return (mean.to(dtype) + deviation).to(mean.dtype)

    def _rows(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of mu and rho that are looked up."""
        mu, rho = self.posterior("weight")
        how = self.scale_grad_by_freq, self.sparse
        mean = F.embedding(input, mu, self.padding_idx, self.max_norm, self.norm_type, *how)
        return mean, F.embedding(input, rho, self.padding_idx, None, 2.0, *how)

    def _eps(self, rows: Tensor, draw: Draw, index: int, dtype: torch.dtype) -> Tensor:
        """The normals (lookups, embedding_dim) of one Monte Carlo sample."""
        size = rows.numel(), self.embedding_dim
        if draw.estimator == "local":
            return draw.normals(*size, index, dtype, role=Role.LOCAL)
        eps = draw.normals(rows.long(), self.embedding_dim, index, dtype)
        if draw.estimator == "flipout":
            eps = eps * draw.signs(*size, index, dtype, role=Role.FLIPOUT_OUTPUT)
        return eps

    def kl_of(self, name: str) -> Tensor:
        """The KL of the rows that are drawn."""
        if self.padding_idx is None:
            return super().kl_of(name)
        # The rows before and after: subtracting the KL of one row would leave it a gradient of rounding errors.
        before, after = slice(self.padding_idx), slice(self.padding_idx + 1, None)
        parts = [tuple(t[rows] if t.dim() else t for t in self.gaussian(name)) for rows in (before, after)]
        kls = [functional.weight_kl(mu, rho, (prior_mu, prior_sigma)) for mu, rho, prior_mu, prior_sigma in parts]
        return torch.stack(kls).sum()
