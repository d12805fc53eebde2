"""Objects that run a module's own forward on tensors that are no parameters of it."""

import inspect
from typing import Any

from torch import nn


class StandIn:
    """Stands in for a module while one forward runs: `module`, but for the attributes that are given.

    Made for that forward alone: a module whose parameters were swapped for drawn tensors would show them to every
    thread that runs it meanwhile, and to the replicas of nn.DataParallel.
    """

    def __init__(self, module: nn.Module | None, **attributes: Any) -> None:
        self._module = module
        for name, value in attributes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        # Of what was not given.
        return getattr(self._module, name)


def stand_in_for(module_class: type[nn.Module]) -> type[StandIn]:
    """A class of stand-ins with the methods of `module_class`, but for those that every module has."""
    methods: dict[str, Any] = {}
    for kind in reversed(module_class.__mro__):
        if kind not in nn.Module.__mro__:
            own = vars(kind).items()
            methods |= {name: f for name, f in own if inspect.isfunction(f) and not name.startswith("__")}
    return type(f"{module_class.__name__}StandIn", (StandIn,), methods)
