"""Computing a second time in the backward pass what would otherwise be kept for it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``; for its backward pass only the arguments are kept, and it runs again.

    `function` draws nothing from torch's generators, and may depend on other tensors, whose gradients are right too.
    """
    # Neither torch.func nor forward-mode derivatives go along with the hooks by which a checkpoint forgets.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return function(*tensors)
    result: Tensor = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return result
