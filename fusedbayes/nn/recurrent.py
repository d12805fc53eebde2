"""The Bayesian counterparts of torch's recurrent layers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedbayes.nn.module import BayesModule
from fusedbayes.nn.stand_in import StandIn, stand_in_for
from fusedbayes.reference import Estimator


class _BayesRecurrent(BayesModule):
    """What the recurrent layers share: one draw of all weights for a whole sequence, then torch's own recurrence.

    The estimators "local" and "flipout" would draw anew at each time step, so "shared" is the only one.
    """

    estimators: ClassVar[tuple[Estimator, ...]] = ("shared",)
    derived_attributes = frozenset({"_flat_weights", "_flat_weight_refs"})
    stand_in: ClassVar[type[StandIn]]  # for `replaces`

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    _flat_weights_names: list[str]

    @classmethod
    def tensors_of(cls, deterministic: nn.Module) -> tuple[str, ...]:
        names: Any = deterministic._flat_weights_names
        return tuple(names)

    @property
    def fan_in(self) -> int:
        """As in torch's initialisation: the hidden size, whatever the size of the input."""
        return self.hidden_size

    @property
    def batched_dims(self) -> int:
        return 3

    def deterministic(self) -> nn.Module:
        module: Any = super().deterministic()
        module._init_flat_weights()
        return module

    def flatten_parameters(self) -> None:
        """Does nothing: weights that are drawn are laid out for cuDNN when they are drawn."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        draw = self._draw(input)
        if draw is None:
            return self._run(self._means(), input, hx)
        draw = self._seeded(draw)
        if draw.num_samples == 1:
            return self._run(self._sampled(draw), input, hx)
        # Each sample's part of the batch, along dimension 0 of the sequences and 1 of the states.
        inputs = input.tensor_split(draw.num_samples)
        states = [None] * draw.num_samples if hx is None else _split(hx, draw.num_samples)
        runs = [
            self._run(self._sampled(draw, index), *each) for index, each in enumerate(zip(inputs, states, strict=True))
        ]
        outputs, last = zip(*runs, strict=True)
        return torch.cat(outputs), _joined(last)

    def _run(self, tensors: dict[str, Tensor], input: Any, hx: Any) -> Any:
        """torch's recurrence with these weights."""
        weights = list(tensors.values())
        if weights[0].is_cuda:
            weights = _flattened(weights)
        # By the references torch sees that none of the weights was replaced since.
        stand_in: Any = self.stand_in(self, _flat_weights=weights, _flat_weight_refs=[None] * len(weights))
        return stand_in.forward(input, hx)

    def _samples_in(self, input: Any) -> int:
        if isinstance(input, PackedSequence) and self._fold is not None and self._fold.num_samples > 1:
            raise ValueError(
                f"the model runs {self._fold.num_samples} Monte Carlo samples as one batch, but {type(self).__name__} "
                "got a PackedSequence, which has no dimension for it: pass samples_at_once=1 to run them one by one"
            )
        return super()._samples_in(input)


class BayesLSTM(_BayesRecurrent):
    """Replaces `torch.nn.LSTM`: one draw of all weights for a whole sequence, then torch's own recurrence.

    Arguments, inputs and outputs are those of `torch.nn.LSTM` (num_layers, bias, batch_first, dropout, bidirectional,
    proj_size; packed sequences, initial states, sequences without a batch) and of `BayesModule`; the random tensors
    are named as its parameters, ``weight_ih_l0`` and so on.

    The weights are drawn once for each forward, whatever the number of time steps: the layer is one function of time
    (Fortunato, Blundell and Vinyals, "Bayesian recurrent neural networks", 2017). Therefore "shared" is the
    only estimator; where a model is asked for another, the layer keeps it. Scales are relative to
    1 / sqrt(hidden_size), as torch's initialisation.

    Raises:
        TypeError, ValueError: as `torch.nn.LSTM` and `BayesModule`; at a call, a packed sequence where several Monte
            Carlo samples run as one batch.
    """

    replaces = nn.LSTM
    stand_in = stand_in_for(nn.LSTM)


class BayesGRU(_BayesRecurrent):
    """Replaces `torch.nn.GRU` as `BayesLSTM` does `torch.nn.LSTM`."""

    replaces = nn.GRU
    stand_in = stand_in_for(nn.GRU)


class BayesRNN(_BayesRecurrent):
    """Replaces `torch.nn.RNN` as `BayesLSTM` does `torch.nn.LSTM`."""

    replaces = nn.RNN
    stand_in = stand_in_for(nn.RNN)


def _split(hx: Any, num_samples: int) -> list[Any]:
    if isinstance(hx, Tensor):
        return list(hx.tensor_split(num_samples, dim=1))
    return list(zip(*(state.tensor_split(num_samples, dim=1) for state in hx), strict=True))


def _joined(states: Any) -> Any:
    if isinstance(states[0], Tensor):
        return torch.cat(states, dim=1)
    return tuple(torch.cat(each, dim=1) for each in zip(*states, strict=True))


def _flattened(weights: list[Tensor]) -> list[Tensor]:
    """The same weights, one after another in one piece of memory.

    cuDNN wants that, matrices first, else it warns and copies them at each call. Views of one tensor, so that
    gradients find their way.
    """
    matrices_first = sorted(range(len(weights)), key=lambda index: -weights[index].dim())
    flat = torch.cat([weights[index].flatten() for index in matrices_first])
    pieces = flat.split([weights[index].numel() for index in matrices_first])
    views = {index: piece.view_as(weights[index]) for index, piece in zip(matrices_first, pieces, strict=True)}
    return [views[index] for index in range(len(weights))]
