"""The Bayesian counterpart of torch.nn.MultiheadAttention."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fusedbayes.nn.linear import BayesLinear
from fusedbayes.nn.module import BayesModule
from fusedbayes.nn.stand_in import StandIn, stand_in_for
from fusedbayes.reference import Estimator


class BayesOutputProjection(BayesLinear):
    """The last projection of a `BayesMultiheadAttention`, which draws its weights without calling it."""

    replaces = NonDynamicallyQuantizableLinear
    estimators: ClassVar[tuple[Estimator, ...]] = ("shared",)


class BayesMultiheadAttention(BayesModule):
    """Replaces `torch.nn.MultiheadAttention`: one draw of all projections for a forward, then torch's own attention.

    Arguments, inputs and outputs are those of `torch.nn.MultiheadAttention` (bias, add_bias_kv, add_zero_attn, kdim,
    vdim, batch_first, dropout; masks, weights of the attention, sequences without a batch) and of `BayesModule`.

    The random tensors are its parameters, ``in_proj_weight`` or ``q_proj_weight``, ``k_proj_weight`` and
    ``v_proj_weight``, ``in_proj_bias``, ``bias_k`` and ``bias_v``, whichever there are; and those of the child
    ``out_proj``, a `BayesLinear`, which is a layer of its own to priors, `kl_report` and the like. "shared" is the only
    estimator; where a model is asked for another, the layer keeps it. Scales are relative to 1 / sqrt(embed_dim).

    Raises:
        TypeError, ValueError, AssertionError: as `torch.nn.MultiheadAttention` and `BayesModule`.
    """

    replaces = nn.MultiheadAttention
    estimators: ClassVar[tuple[Estimator, ...]] = ("shared",)
    stand_in = stand_in_for(nn.MultiheadAttention)
    parts = {"out_proj": BayesOutputProjection}  # noqa: RUF012

    embed_dim: int
    num_heads: int
    batch_first: bool
    out_proj: BayesLinear

    @classmethod
    def tensors_of(cls, deterministic: nn.Module) -> tuple[str, ...]:
        names = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        # Without them they are no parameters, not even parameters that are None.
        return *names, *(name for name in ("bias_k", "bias_v") if name in deterministic._parameters)

    @property
    def fan_in(self) -> int:
        return self.embed_dim

    @property
    def batched_dims(self) -> int:
        return 3

    @torch.no_grad()
    def reset_parameters(self) -> None:
        module: Any = self.deterministic()
        module.out_proj.reset_parameters()
        module._reset_parameters()
        for layer in (self, self.out_proj):
            layer._reset_sigmas_and_priors()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        options = (need_weights, average_attn_weights, is_causal)
        draw, draw_out = self._draw(query), self.out_proj._draw(query)
        if draw is None or draw_out is None:
            tensors, out = self._means(), self.out_proj._means()
            return self._attend(tensors, out, (query, key, value, key_padding_mask, attn_mask), *options)
        draw, draw_out = self._seeded(draw), self.out_proj._seeded(draw_out)
        batches = _batches((query, key, value, key_padding_mask, attn_mask), draw.num_samples)
        runs = []
        for index, batch in enumerate(batches):
            tensors, out = self._sampled(draw, index), self.out_proj._sampled(draw_out, index)
            runs.append(self._attend(tensors, out, batch, *options))
        if len(runs) == 1:
            return runs[0]
        outputs, weights = zip(*runs, strict=True)
        return torch.cat(outputs), None if weights[0] is None else torch.cat(weights)

    def _attend(
        self,
        tensors: dict[str, Tensor],
        out: dict[str, Tensor],
        inputs: tuple[Tensor | None, ...],
        need_weights: bool,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """torch's attention with these weights."""
        query, key, value, key_padding_mask, attn_mask = inputs
        out_proj = StandIn(None, weight=out["weight"], bias=out.get("bias"))
        stand_in: Any = self.stand_in(self, **tensors, out_proj=out_proj)
        return stand_in.forward(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )


def _batches(tensors: tuple[Tensor | None, ...], num_samples: int) -> list[tuple[Tensor | None, ...]]:
    """Each Monte Carlo sample's part along dimension 0; a mask for all batches is not taken apart."""
    if num_samples == 1:
        return [tensors]
    query, key, value, key_padding_mask, attn_mask = tensors
    queries = _split(query, num_samples)
    # What was one tensor stays one: torch looks whether a sequence attends to itself.
    keys = queries if key is query else _split(key, num_samples)
    values = keys if value is key else _split(value, num_samples)
    for_all = attn_mask is not None and attn_mask.dim() == 2
    attn_masks = [attn_mask] * num_samples if for_all else _split(attn_mask, num_samples)
    return list(zip(queries, keys, values, _split(key_padding_mask, num_samples), attn_masks, strict=True))


def _split(tensor: Tensor | None, num_samples: int) -> list[Any]:
    return [None] * num_samples if tensor is None else list(tensor.tensor_split(num_samples))
