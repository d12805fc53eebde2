"""Monte Carlo samples as one batch: the input repeated, each repetition under its own draw of the weights."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from fusedbayes.checks import check_count
from fusedbayes.nn.module import BayesModule, Repeated

# Numbers that a folded input has at most by default, so that folding a large batch does not take the memory of all its
# samples at once. A large batch gains little: reading the weights is what samples share.
LARGEST_INPUT = 2**24


def samples_at_once(x: Any, num_samples: int, wanted: int | None) -> int:
    """How many samples are folded into one batch: `wanted`, or as many as make an input of LARGEST_INPUT numbers.

    By default none are where a tensor has a single dimension, which may be one example without a batch.

    Raises:
        TypeError, ValueError: `wanted` is not a count.
    """
    if num_samples == 1:
        return 1
    if wanted is not None:
        return min(num_samples, check_count(wanted, "samples_at_once"))
    tensors = _tensors(x)
    if not tensors or any(tensor.dim() == 1 for tensor in tensors):
        return 1
    return max(1, min(num_samples, LARGEST_INPUT // max(1, *(tensor.numel() for tensor in tensors))))


def check_foldable(model: nn.Module) -> None:
    """Raises ValueError if a module of `model` is known to mix what lies along dimension 0 of its input."""
    for name, module in model.named_modules():
        place = f"the {type(module).__name__} {name!r}" if name else "the model"
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            reason = f"{place} normalises with the statistics of its batch"
        elif isinstance(module, nn.RNNBase | nn.MultiheadAttention) and not module.batch_first:
            reason = f"{place} has batch_first=False: dimension 0 is not the batch"
        else:
            continue
        raise ValueError(
            f"several Monte Carlo samples run as one batch, but {reason}: pass samples_at_once=1 to run them one after "
            "another"
        )


def fold(x: Any, num_samples: int) -> Any:
    """`x` with each of its tensors repeated so many times along dimension 0.

    Args:
        x: a tensor, or a tuple, list or dict of such; other things in it stay as they are.

    Raises:
        ValueError: there is no tensor in `x`, or they do not have one size of dimension 0.
    """
    batch_size(x)
    return _repeated(x, num_samples)


def batch_size(x: Any) -> int:
    """The one size that dimension 0 has in all tensors of `x`; errors as `fold`."""
    tensors = _tensors(x)
    sizes = {tensor.shape[:1] for tensor in tensors}
    if len(sizes) != 1 or () in sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensor"
        raise ValueError(
            "to run several Monte Carlo samples as one batch, every tensor of the input must have the batch as its "
            f"first dimension, got {shapes}: pass samples_at_once=1 to run them one after another"
        )
    return tensors[0].shape[0]


def unfold(output: Any, num_samples: int, batch: int) -> list[Any]:
    """What the model gave for a folded input, sample by sample: a tensor, or whatever of tensors pytrees look into.

    Raises:
        ValueError: the first dimension of a tensor is not that of the folded input.
    """

    def split(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return [tensor] * num_samples
        if tensor.dim() == 0 or tensor.shape[0] != num_samples * batch:
            raise ValueError(
                f"the model got {num_samples} samples of a batch of {batch} along dimension 0, so its output must have "
                f"shape ({num_samples * batch}, ...), got {tuple(tensor.shape)}: pass samples_at_once=1 if it treats "
                "dimension 0 otherwise"
            )
        return tensor.chunk(num_samples) if batch else [tensor] * num_samples

    leaves, structure = tree_flatten(output)
    return [tree_unflatten(each, structure) for each in zip(*map(split, leaves), strict=True)]


@contextlib.contextmanager
def drawing(layers: Iterable[BayesModule], num_samples: int, x: Any) -> Iterator[Any]:
    """Has the layers draw so many Monte Carlo samples, each for a batch of its own; yields `x` folded.

    A layer that gets the folded tensor itself knows that its batches are equal: "local" multiplies one of them.
    """
    folded, repeated = x, None
    if num_samples > 1:
        folded = fold(x, num_samples)
        if isinstance(x, Tensor) and not (torch.compiler.is_compiling() or folded.is_inference()):
            repeated = Repeated(folded, folded._version, x)
    before = [(layer, layer._num_samples, layer._repeated) for layer in layers]
    try:
        for layer, *_ in before:
            vars(layer)["_num_samples"], vars(layer)["_repeated"] = num_samples, repeated
        yield folded
    except Exception as error:
        if num_samples > 1 and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(
                f"The model ran on {num_samples} Monte Carlo samples as one batch, repeated along dimension 0; "
                "samples_at_once=1 runs them one after another."
            )
        raise
    finally:
        for layer, number, repetition in before:
            vars(layer)["_num_samples"], vars(layer)["_repeated"] = number, repetition


def _tensors(x: Any) -> list[Tensor]:
    # Of these types alone: of another, say a packed sequence, nobody knows which of its tensors begin with the batch.
    if isinstance(x, Tensor):
        return [x]
    if type(x) is dict:
        x = list(x.values())
    return [tensor for item in x for tensor in _tensors(item)] if type(x) in (tuple, list) else []


def _repeated(x: Any, num_samples: int) -> Any:
    if isinstance(x, Tensor):
        return x.repeat(num_samples, *(1,) * (x.dim() - 1))
    if type(x) is dict:
        return {key: _repeated(value, num_samples) for key, value in x.items()}
    return type(x)(_repeated(item, num_samples) for item in x) if type(x) in (tuple, list) else x
