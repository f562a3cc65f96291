"""Functions that a config names as ``module:function``."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from pipeline.files import sha256_text


def import_function(name: str) -> tuple[Callable[..., Any], str]:
    """Return the function named ``module:function`` and the hash of its module's source.

    Raises:
        ImportError: when the module or the function does not exist; the message says which.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise ImportError(f"{name!r} is not of the form module:function")
    module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ImportError(f"{module_name} has no function {function_name}")
    return function, sha256_text(inspect.getsource(inspect.getmodule(function) or module))
