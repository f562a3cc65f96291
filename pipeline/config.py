"""Strict configuration: TOML in, frozen pydantic models out; one error names every problem and its remedy."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Tag, ValidationError
from pydantic_core import to_jsonable_python

from pipeline.errors import ConfigError
from pipeline.text import one_line


class StrictModel(BaseModel):
    """Base of every config table: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _shown_as_it_is(name: str) -> str:
    if one_line(name) != name:
        raise ValueError(f"a name must be one line without invisible characters, found {one_line(name)!r}")
    return name


def _can_exist(place: str) -> str:
    sizes = [(place, 4095), *((part, 255) for part in place.split("/"))]
    if "\0" in place or any(len(os.fsencode(text)) > most for text, most in sizes):
        raise ValueError("no file system has such a path: it is too long, or holds a NUL character")
    return place


Name = Annotated[str, Field(min_length=1), AfterValidator(_shown_as_it_is)]
"""A name that tables, logs and reports show."""
Place = Annotated[str, AfterValidator(_can_exist)]
"""A path, a URL, or the name of what is no file."""
Model = TypeVar("Model", bound=BaseModel)
MOST_NESTING = 50
"""Levels of tables and lists in a config."""
MOST_BYTES = 4 << 20
"""Of a config."""
LONG_KEY = re.compile(rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MOST_NESTING}}}""")
"""A key of so many parts. tomllib's memory grows with the square of their number."""
SHORT = Repr()
"""How a message shows a value that was found."""
SHORT.maxstring = SHORT.maxother = 200
DECIDES_NOTHING = "DECIDES_NOTHING"
"""Class variable of a config table: the settings that decide no row and are in no recipe."""
DECIDES_ELSEWHERE = "DECIDES_ELSEWHERE"
"""Class variable of a config table: the settings that a stage parameter replaces in the recipe."""


def chosen(model: BaseModel) -> dict[str, Any]:
    """Return a recipe's settings, as JSON-like values: those that decide rows and differ from the default.

    A setting that a later version adds changes no recipe while it has its default. Whoever changes a default raises
    the stage's version. See docs/decisions/0013.
    """
    found: dict[str, Any] = _walk(model, model.model_dump(mode="json"), with_defaults=False)
    return found


def deciding(model: BaseModel) -> dict[str, Any]:
    """Return every setting that decides rows, defaults included, as JSON-like values."""
    found: dict[str, Any] = _walk(model, model.model_dump(mode="json"), with_defaults=True)
    return found


def default_of(table: type[BaseModel], name: str) -> Any:
    """Return the default of a setting, as a JSON-like value."""
    return to_jsonable_python(table.model_fields[name].get_default(call_default_factory=True))


def _walk(value: Any, dumped: Any, *, with_defaults: bool) -> Any:
    """Return ``dumped``, the JSON-like form of ``value``, without the settings that are in no recipe."""
    if isinstance(value, BaseModel):
        left_out = set(getattr(type(value), DECIDES_NOTHING, ()))
        if not with_defaults:
            left_out |= set(getattr(type(value), DECIDES_ELSEWHERE, ()))
        found = {}
        for name, field in type(value).model_fields.items():
            item = getattr(value, name)
            is_tag = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
            is_default = not field.is_required() and item == field.get_default(call_default_factory=True)
            # a tag names the table's class: it is kept even at its default
            if name not in left_out and (with_defaults or is_tag or not is_default):
                found[name] = _walk(item, dumped[name], with_defaults=with_defaults)
        return found
    if isinstance(value, Mapping):
        return {key: _walk(item, dumped[key], with_defaults=with_defaults) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(a, b, with_defaults=with_defaults) for a, b in zip(value, dumped, strict=True)]
    return dumped


def load_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Read-only.

    Raises:
        ConfigError: when the file is missing or is not TOML.
    """
    return parse_toml(read_toml(path), str(path))


def read_toml(path: Path) -> str:
    """Return the text of a TOML file, exactly as it is. Read-only.

    Raises:
        ConfigError: when the file is missing or is no text.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no regular file: name a TOML file, for example configs/demo.toml")
        if path.exists() and path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} has more than {MOST_BYTES:,} bytes: name a config, which is shorter")
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: name a TOML file, for example configs/demo.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a TOML file ({error}): name one, e.g. configs/demo.toml"
        ) from error


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """Return the tables of a TOML text; ``source`` names it in messages.

    Raises:
        ConfigError: when it is not TOML, or nested too deeply, or holds a number that TOML's 64 bits cannot.
    """
    if LONG_KEY.search(text):
        raise _nested_too_deeply(source)
    try:
        tables = tomllib.loads(text)
    except ValueError as error:  # tomllib's own, and Python's for a number of thousands of digits
        raise ConfigError(f"{source} is not valid TOML: {error}") from error
    except RecursionError:
        raise _nested_too_deeply(source) from None
    check_nesting(tables, source)
    return tables


def check_nesting(value: Any, source: str) -> None:
    """Check that tables and lists are not nested more deeply than functions that call themselves can follow.

    Raises:
        ConfigError: naming ``source``.
    """
    level = [value]
    for _ in range(MOST_NESTING):
        level = [
            item
            for outer in level
            if isinstance(outer, Mapping | list)
            for item in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if any(type(item) is int and not -(2**63) <= item < 2**63 for item in level):
            raise ConfigError(f"{source} holds an integer of more than 64 bits: no setting needs that; correct it")
    if level:
        raise _nested_too_deeply(source)


def _nested_too_deeply(source: str) -> ConfigError:
    return ConfigError(
        f"{source} holds tables or lists nested more than {MOST_NESTING} deep: no setting needs that; remove levels"
    )


def without_nulls(tables: dict[str, object]) -> dict[str, object]:
    """Return the tables without nulls, which TOML cannot express; an absent key has its default."""

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in tables.items() if value is not None}


def apply_overrides(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the tables with ``key.path=value`` applied; a value that is not TOML is text.

    Raises:
        ConfigError: when an override has no ``=`` or leads through something that is not a table.
    """
    check_nesting(tables, "the config")
    result: dict[str, Any] = _copy(tables)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > MOST_NESTING:
            raise ConfigError(f"--set {override}: expected key.path=value, for example --set update.learning_rate=2e-6")
        table = result
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {override}: {key} is not a table of the config")
        table[keys[-1]] = _value(text.strip())
    check_nesting(result, "--set")
    return result


def validate(model: type[Model], tables: Mapping[str, Any], source: str) -> Model:
    """Return the validated config.

    Raises:
        ConfigError: one message that lists every problem with its key, what was found and what was expected.
    """
    try:
        return model.model_validate(dict(tables))
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise ConfigError(f"{source}:\n  " + "\n  ".join(lines)) from None


def _explain(model: type[BaseModel], problem: Any) -> str:
    location, table = _without_tags(model, problem["loc"])
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = sorted(table.model_fields) if table else []
        close = difflib.get_close_matches(location[-1], known, n=1)
        return f"{key}: unknown key; " + (f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{key}: missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, found {SHORT.repr(problem['input'])}"


def _without_tags(model: type[BaseModel], location: Sequence[Any]) -> tuple[list[str], type[BaseModel] | None]:
    """Return the keys that lead to a problem, and the class of the table that has the last key.

    Where a table can have several classes, pydantic puts the class's tag after the table's key.
    """
    keys: list[str] = []
    inside: type[BaseModel] | None = model
    tables = {"": model}
    for part in location:
        if len(tables) > 1 and part in tables:
            tables = {"": tables[part]}
            continue
        inside = next(iter(tables.values()), None)
        keys.append(str(part))
        if inside is not None and part in inside.model_fields:
            tables = _tables(inside.model_fields[part].annotation)
        elif not isinstance(part, int):
            tables = {}
    return keys, inside


def _tables(annotation: Any) -> dict[str, type[BaseModel]]:
    """Return the classes that a field's tables can have, by tag."""
    found: dict[str, type[BaseModel]] = {}
    for candidate in _parts(annotation):
        tags = [str(data.tag) for data in getattr(candidate, "__metadata__", ()) if isinstance(data, Tag)]
        bare = getattr(candidate, "__origin__", candidate) if tags else candidate
        if isinstance(bare, type) and issubclass(bare, BaseModel):
            found.setdefault(tags[0] if tags else "", bare)
    return found


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation, and what it is made of: of a list its elements, of a choice its members."""
    yield annotation
    if not any(isinstance(data, Tag) for data in getattr(annotation, "__metadata__", ())):
        for inner in getattr(annotation, "__args__", ()):
            yield from _parts(inner)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text
    except RecursionError:
        raise _nested_too_deeply("--set") from None


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
