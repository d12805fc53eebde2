"""What a Bayesian layer shows where the class that it replaces has a parameter."""

from typing import Any, NoReturn

from torch import Tensor

# What code may ask of a weight without looking at its values.
_METADATA = frozenset(
    {
        *("shape", "size", "dim", "ndim", "numel", "nelement", "dtype", "device", "layout", "requires_grad"),
        *("element_size", "is_floating_point", "is_complex", "is_sparse", "is_quantized", "is_nested", "get_device"),
        *("is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta"),
    }
)


class RandomTensor:
    """Shape, dtype and device of a random tensor, but no values: those are drawn when the layer is called.

    Models ask for ``layer.weight.dtype``, to cast what they pass in, or whether ``layer.bias is None``: both work on a
    Bayesian layer, whose ``weight`` and ``bias`` are of this class. Code that would compute with the weight past the
    layer, such as ``F.linear(x, layer.weight)``, gets an error: with the mean it would silently not be Bayesian, and
    with a draw of its own it would be another function than the layer computes. torch's inference shortcuts, which do
    that, see a type that they do not know, and call the layers.

    Raises:
        AttributeError: what is asked of it depends on the values.
        TypeError: it is passed to a function of torch.
    """

    def __init__(self, layer: str, name: str, mu: Tensor) -> None:
        self._layer = layer
        self._name = name
        self._mu = mu

    def __getattr__(self, attribute: str) -> Any:
        if attribute in _METADATA:
            return getattr(self._mu, attribute)
        if attribute.startswith("_"):  # what Python itself looks for, while it copies say
            raise AttributeError(attribute)
        raise AttributeError(f"{self!r} has no {attribute!r}: {_HINT.format(name=self._name)}")

    def __repr__(self) -> str:
        return f"<the random {self._name!r} of a {self._layer}, {tuple(self._mu.shape)}, {self._mu.dtype}>"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(function, "__name__", str(function))
        given = (*args, *(kwargs or {}).values())
        nested = (item for value in given for item in (value if isinstance(value, list | tuple) else (value,)))
        raise next(item for item in nested if isinstance(item, cls))._refusal(name)

    def _refuse(self, other: Any) -> NoReturn:
        raise self._refusal("an operator")

    # Python's own error would not say why.
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = _refuse

    def _refusal(self, function: str) -> TypeError:
        return TypeError(f"{function} got {self!r}: {_HINT.format(name=self._name)}")


_HINT = "its values are drawn when the layer is called; its mean is layer.{name}_mu"
