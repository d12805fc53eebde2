"""Checks of arguments that several modules share; each error names the argument, its value and what was expected."""

import math
import reprlib
from numbers import Integral, Number, Real
from typing import Any

import torch
from torch import Tensor, nn


def describe(value: Any) -> str:
    """`value` as an error message shows it: a tensor by dtype and shape, a number or string by value and type."""
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    kind = type(value).__name__
    return f"{reprlib.repr(value)} ({kind})" if isinstance(value, bool | Number | str | torch.dtype) else kind


def check_module(model: nn.Module) -> None:
    """Raises TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {describe(model)}")


def check_count(value: int, name: str) -> int:
    """Returns the int `value`, NumPy's too; raises TypeError or ValueError unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def check_number(value: float, name: str, *, positive: bool = False) -> float:
    """Returns the number `value`; raises TypeError or ValueError unless it is finite and, if asked for, positive."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest float
        number = math.inf
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''}, got {reprlib.repr(value)}")
    return number


def check_non_negative(value: float, name: str) -> float:
    """Returns the number `value`; raises TypeError or ValueError unless it is finite and not negative."""
    number = check_number(value, name)
    if number < 0.0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return number


def check_moment(value: Any, name: str, like: Tensor, dtype: torch.dtype, *, positive: bool = False) -> None:
    """Raises TypeError or ValueError unless this is a mean, or a deviation, of a tensor like that, in `dtype` too."""
    if not isinstance(value, Tensor):
        check_number(value, name, positive=positive)
        return
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a floating-point tensor, got {describe(value)}")
    if value.shape not in ((), like.shape):
        raise ValueError(f"{name} must have shape () or {tuple(like.shape)}, got {tuple(value.shape)}")
    rounded = value.to(dtype)
    if not torch.isfinite(rounded).all() or (positive and not (rounded > 0).all()):
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''} in {dtype}, got {value}")


def check_fits(value: float | Tensor, name: str, dtype: torch.dtype, least: float) -> None:
    """Raises ValueError unless the number `value` lies between `least` and the largest number of `dtype`."""
    most = torch.finfo(dtype).max
    if not isinstance(value, Tensor) and not least <= value <= most:
        raise ValueError(f"{name} must lie in [{least:.4g}, {most:.4g}] for {dtype}, got {value}")
