"""Loss and advantage functions that a config names as ``module:function``, and their sources in recipes."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.errors import ConfigError, UntrustedFunction
from pipeline.files import sha256_text
from pipeline.functions import import_function
from pipeline.manifest import canonical_json
from stages.rewards.functions import source_hashes

SOURCES = "function_sources"
"""Parameter of a stage whose config names such functions: setting -> hash of the function's source."""


def sources(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the parameter of a stage with these settings and function names; empty if all functions are built in.

    As with rewards, the user's modules that a function's module imports are part of its source.

    Raises:
        ConfigError: when a function cannot be imported.
    """
    found = {setting: _source(setting, name) for setting, name in names.items() if is_custom(name)}
    return {SOURCES: found} if found else {}


def is_custom(name: str) -> bool:
    """Return whether the name is a ``module:function`` and not a built-in one."""
    return ":" in name


def custom_function(setting: str, name: str) -> Callable[..., Any]:
    """Return the function that a setting names.

    Raises:
        ConfigError: when it cannot be imported.
        UntrustedFunction: when only a recorded config names it.
    """
    try:
        return import_function(name)[0]
    except UntrustedFunction:
        raise
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        raise ConfigError(
            f"{setting} names {name!r}, which cannot be imported ({type(error).__name__}: {error}): expected "
            "module:function, importable from the current directory; correct the name, or the module"
        ) from error


def check_call(setting: str, name: str, positional: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Check that a custom function exists and accepts these arguments; built-in ones do.

    Args:
        setting: the setting that names it, for the message.
        name: the function's name.
        positional: its positional arguments.
        arguments: its keyword arguments.

    Raises:
        ConfigError: naming the setting and what is wrong.
    """
    if not is_custom(name):
        return
    signature = inspect.signature(custom_function(setting, name))
    try:
        signature.bind(*positional, **arguments)
    except TypeError as error:
        call = ", ".join([*positional, *(f"{key}=..." for key in arguments)])
        raise ConfigError(
            f"{setting} names {name!r}, which takes {signature} ({error}): expected a function that can be called with "
            f"({call}); correct the function or its arguments"
        ) from error
    _source(setting, name)  # now, while the file is what was imported


def _source(setting: str, name: str) -> str:
    function = custom_function(setting, name)
    named = sys.modules[name.partition(":")[0]]
    defining = inspect.getmodule(function) or named  # an alias may come from elsewhere
    return sha256_text(canonical_json({**source_hashes(defining), **source_hashes(named)}))
