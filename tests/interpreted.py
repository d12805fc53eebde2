"""Triton's interpreter without what takes half of its time and changes nothing."""

import functools
from types import ModuleType
from typing import Any

from triton import language
from triton.runtime.interpreter import InterpretedFunction

INTERPRETED_CALL = InterpretedFunction.__call__


@functools.cache
def languages(function: Any) -> tuple[ModuleType, ...]:
    """What the interpreter patches for a function: the language by the names that its module has for it."""
    known = language, language.core
    return tuple(value for value in function.__globals__.values() if any(value is module for module in known))


def call_in_patched_language(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """Calls a function of a kernel, whose launch or an earlier call has usually patched the language already."""
    if any(language.core.is_builtin(module.load) for module in languages(function.fn)):
        return INTERPRETED_CALL(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)


def patch_language_once() -> None:
    """The interpreter would patch all of `triton.language` again at every call, of which a tile has hundreds."""
    InterpretedFunction.__call__ = call_in_patched_language
