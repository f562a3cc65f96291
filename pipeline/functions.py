"""Functions that a config names as ``module:function``: which may be imported, and where they are looked for.

A config that its user wrote may name any function. One that a run has recorded may be a stranger's: the command line
imports of it only rewards of the library, and asks no address, unless the user trusts the run or names them himself.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UntrustedFunction
from pipeline.files import sha256_text

LIBRARY = tuple(f"stages.rewards.{family}." for family in ("answers", "text", "models", "judge", "code"))
"""Beginnings of the names of modules whose rewards any config may name."""

ON_THE_HUB = "would be asked for on the hub"
"""What is found of a model or a dataset that is no place on this machine, see `check_permitted`."""

_permitted: set[str] | None = None
"""Functions outside of the library, and addresses, that are permitted; None = all. Of the whole process, background
tasks too."""


@contextmanager
def permitting_only(names: Iterable[str] = ()) -> Iterator[None]:
    """Within this context, import from outside of the library only these functions, and those that `permit` adds."""
    global _permitted
    before, _permitted = _permitted, set(names)
    try:
        yield
    finally:
        _permitted = before


def permit(names: Iterable[str] | None) -> None:
    """Permit what the user has named, or with None all: the config is the user's, or the run is trusted."""
    global _permitted
    if names is None:
        _permitted = None
    elif _permitted is not None:
        _permitted = _permitted.union(names)


def texts_in(tables: Any) -> set[str]:
    """Return every text in the tables that a user has written; those that name functions or addresses count."""
    found: set[str] = set()
    waiting = [tables]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
    return found


def check_permitted(name: str, found: str) -> None:
    """Check that a function, an address or a hub name may be used for what a stranger must not have done for him.

    Raises:
        UntrustedFunction: saying what was found, unless the user has named it or trusts the run.
    """
    if _permitted is not None and name not in _permitted:
        raise UntrustedFunction(
            f"the run's own config names {name}, which {found}: expected a reward of this library, or a file of this "
            "machine, for nothing else that a run names is executed or asked for unasked; look at it, then give "
            "--trust, or name it in a config of your own"
        )


def import_function(name: str) -> tuple[Callable[..., Any], str]:
    """Return the function named ``module:function`` and the hash of its module's source.

    A module outside of the library is looked for in the current directory too, after all other places: a user's file
    cannot replace an installed module.

    Raises:
        ImportError: when the module or the function does not exist; the message says which.
        UntrustedFunction: when it is not of the library and was not permitted.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise ImportError(f"{name!r} is not of the form module:function")
    is_library = module_name.startswith(LIBRARY)
    if not is_library:
        check_permitted(name, "lies outside of the library")
        _look_in_current_directory()
    module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ImportError(f"{module_name} has no function {function_name}{_hidden_file(module_name, module)}")
    if is_library and not _is_reward(module_name, function_name, function):
        check_permitted(name, "is no reward of the library")
    return function, sha256_text(inspect.getsource(inspect.getmodule(function) or module))


def _look_in_current_directory() -> None:
    here = str(Path.cwd())
    if not {here, ""}.intersection(sys.path):
        sys.path.append(here)
        importlib.invalidate_caches()


def _hidden_file(module_name: str, module: Any) -> str:
    """Return what to say when an installed module has the name of a file in the current directory."""
    file = Path(f"{module_name}.py").resolve()
    found = getattr(module, "__file__", None)
    if not file.is_file() or found is None or Path(found).resolve() == file:
        return ""
    return f": it is {found}, and {file} has the same name; rename your file"


def _is_reward(module_name: str, name: str, function: Callable[..., Any]) -> bool:
    """Return whether a function of a library's module is one of its rewards, and not what these are made of."""
    if name.startswith("_") or getattr(function, "__module__", None) != module_name:
        return False
    signature = inspect.signature(function)
    is_expression = getattr(signature.return_annotation, "__name__", "") == "Expr"
    return is_expression or not {"completion", "completions"}.isdisjoint(signature.parameters)
