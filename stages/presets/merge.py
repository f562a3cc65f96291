"""A config's tables over those of its preset."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import parse_toml
from pipeline.errors import ConfigError

FOLDER = Path(__file__).parent
CHOICES = {"loss": "name", "correction": "kind"}
"""Tables with options that belong to a choice -> the key that makes it."""


def presets() -> tuple[str, ...]:
    """Return the names of the presets. Read-only."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def with_preset(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's tables without ``preset``, over those of the preset that it names. Read-only.

    What the config says itself counts. A table that chooses another loss or correction takes no option of the preset's.

    Raises:
        ConfigError: when there is no such preset.
    """
    own = dict(tables)
    name = own.pop("preset", None)
    if name is None:
        return own
    if name not in presets():
        raise ConfigError(f"preset is {name!r}: expected one of {', '.join(presets())}; correct the name")
    path = FOLDER / f"{name}.toml"
    return _merged(parse_toml(path.read_text(encoding="utf-8"), path.name), own)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    key = CHOICES.get(table, "")
    if key in base and key in over and base[key] != over[key]:
        return dict(over)
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            merged[key] = _merged(base[key], over[key], key)
    return merged
