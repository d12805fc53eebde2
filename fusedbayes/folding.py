"""Monte Carlo samples as one batch: the input repeated, each repetition under its own draw of the weights."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from fusedbayes.checks import check_count
from fusedbayes.nn.context import Fold, Repeated
from fusedbayes.nn.module import BayesModule

# Numbers that a folded input has at most by default, so that folding a large batch does not take the memory of all its
# samples at once. A large batch gains little: reading the weights is what samples share.
LARGEST_INPUT = 2**24
OF_INDEX = 2**10  # numbers that an integer stands for: it may be looked up in an embedding


def samples_at_once(x: Any, num_samples: int, wanted: int | None) -> int:
    """How many samples are one batch: `wanted`, or as many as make tensors of LARGEST_INPUT numbers at most.

    By default none are where the tensors have no common batch, or a single dimension, which may be one example.

    Raises:
        TypeError, ValueError: `wanted` is not a count.
    """
    if wanted is not None:
        return min(num_samples, check_count(wanted, "samples_at_once"))
    tensors = _tensors(x)
    if num_samples == 1 or any(t.dim() < 2 or t.layout != torch.strided for t in tensors):
        return 1
    if len({len(tensor) for tensor in tensors}) != 1:
        return 1
    largest = max(tensor.numel() * (1 if tensor.is_floating_point() else OF_INDEX) for tensor in tensors)
    return max(1, min(num_samples, LARGEST_INPUT // max(1, largest)))


def check_foldable(model: nn.Module) -> None:
    """Raises ValueError if a module of `model` is known to mix what lies along dimension 0 of its input."""
    for name, module in model.named_modules():
        place = f"the {type(module).__name__} {name!r}" if name else "the model"
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            reason = f"{place} normalises with the statistics of its batch"
        elif _is_sequential(module) and not module.batch_first:
            reason = f"{place} has batch_first=False: dimension 0 is not the batch"
        elif isinstance(module, nn.DataParallel):
            reason = f"{place} scatters dimension 0 over devices"
        else:
            continue
        raise ValueError(
            f"several Monte Carlo samples run as one batch, but {reason}: pass samples_at_once=1 to run them one after "
            "another"
        )


def _is_sequential(module: nn.Module) -> bool:
    kind = getattr(module, "replaces", None) if isinstance(module, BayesModule) else type(module)
    return kind is not None and issubclass(kind, nn.RNNBase | nn.MultiheadAttention)


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
        if tensor is None or isinstance(tensor, bool | Number | str):
            return [tensor] * num_samples
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"several Monte Carlo samples run as one batch, but the output holds a {type(tensor).__name__}, which "
                "cannot be taken apart into samples: pass samples_at_once=1 to run them one after another"
            )
        if tensor.dim() == 0 or tensor.shape[0] != num_samples * batch:
            raise ValueError(
                f"the model got {num_samples} samples of a batch of {batch} along dimension 0, so its output must have "
                f"shape ({num_samples * batch}, ...), got {tuple(tensor.shape)}: pass samples_at_once=1 if it treats "
                "dimension 0 otherwise"
            )
        # Copies, which may be written to as the output of a single sample may.
        return [tensor.narrow(0, index * batch, batch).clone() for index in range(num_samples)]

    leaves, structure = tree_flatten(output)
    return [tree_unflatten(each, structure) for each in zip(*map(split, leaves), strict=True)]


@contextlib.contextmanager
def drawing(layers: Iterable[BayesModule], num_samples: int, x: Any) -> Iterator[Any]:
    """Has the layers draw so many Monte Carlo samples, each for a batch of its own; yields `x` folded.

    A layer that gets the folded tensor itself knows that its batches are equal: "local" multiplies one of them.
    """
    folded, fold_of_layers = x, Fold(1, 1)
    if num_samples > 1:
        folded, repeated = fold(x, num_samples), None
        if isinstance(x, Tensor) and not (torch.compiler.is_compiling() or x.is_inference() or folded.is_inference()):
            repeated = Repeated(folded, x, (folded._version, x._version))
        fold_of_layers = Fold(num_samples, batch_size(x), repeated)
    before = [(layer, layer._fold) for layer in layers]
    try:
        for layer, _ in before:
            vars(layer)["_fold"] = fold_of_layers
        yield folded
    except Exception as error:
        if num_samples > 1 and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(
                f"The model ran on {num_samples} Monte Carlo samples as one batch, repeated along dimension 0; "
                "samples_at_once=1 runs them one after another."
            )
        raise
    finally:
        for layer, earlier in before:
            vars(layer)["_fold"] = earlier


def recalled(output: Any, layers: Sequence[BayesModule], num_samples: int, x: Any) -> Any:
    """The output of a folded input; its backward pass tells the layers of the fold, for checkpoints that it repeats."""
    leaves, structure = tree_flatten(output)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if places and not (transformed or torch.compiler.is_compiling()):
        known = _Recall.apply(layers, Fold(num_samples, batch_size(x)), *(leaves[i] for i in places))
        for i, leaf in zip(places, known, strict=True):
            leaves[i] = leaf
    return tree_unflatten(leaves, structure)


class _Recall(torch.autograd.Function):
    """The identity. When its backward is called, those of the model's own operations are still to come."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[BayesModule], fold: Fold, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.layers, ctx.fold = layers, fold
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        for layer in ctx.layers:
            vars(layer)["_recalls"] = (*layer._recalls, ctx.fold)

        def forget() -> None:
            for layer in ctx.layers:
                vars(layer)["_recalls"] = ()

        # At the end of this backward pass, with those that checkpoints run within it.
        torch.autograd.Variable._execution_engine.queue_callback(forget)
        return None, None, *gradients


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
