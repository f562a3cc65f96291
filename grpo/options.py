"""Config tables made of the signatures of functions, so that an option is written once: where it is used. No torch."""

from collections.abc import Callable, Iterable
from inspect import Parameter, signature
from typing import Annotated, Any, Literal, Union

from pydantic import Discriminator, Tag, create_model, model_validator

from grpo.strict import StrictModel

CUSTOM = "module:function"
"""Tag of the table of a function of the user's."""


def options_of(
    function: Callable[..., Any], key: str, base: type[StrictModel], check: Callable[..., None] | None = None
) -> type[Any]:
    """Return the table of a function's keyword-only parameters; ``key`` holds the function's name.

    ``check`` takes those of them that it names, and raises ValueError for values that do not go together.
    """
    name = function.__name__
    fields: dict[str, Any] = {
        found.name: (found.annotation, ... if found.default is Parameter.empty else found.default)
        for found in _keywords(function)
    }
    validators: dict[str, Any] = {}
    if check is not None:
        checked = tuple(signature(check).parameters)

        def go_together(table: Any) -> Any:
            check(**{name: getattr(table, name) for name in checked})
            return table

        validators["go_together"] = model_validator(mode="after")(go_together)
    return create_model(
        name,
        __base__=base,
        __doc__=f"Options of `{function.__module__}.{name}`.",
        __validators__=validators,
        **{key: (Literal[name], name), **fields},
    )


def given(function: Callable[..., Any], table: Any) -> dict[str, Any]:
    """Return a function's keyword arguments from the table of its options."""
    return {found.name: getattr(table, found.name) for found in _keywords(function)}


def _keywords(function: Callable[..., Any]) -> list[Parameter]:
    return [found for found in signature(function).parameters.values() if found.kind is Parameter.KEYWORD_ONLY]


def one_of(tables: Iterable[type[Any]], key: str, default: str, custom: type[StrictModel] | None = None) -> Any:
    """Return the type of a table that is one of these by what its ``key`` says; one without it is the default's.

    ``custom`` is the table of functions of the user's, ``module:function``.
    """
    by_name = {table.model_fields[key].default: table for table in tables}

    def tag(value: Any) -> str | None:
        name = value.get(key, default) if isinstance(value, dict) else getattr(value, key, None)
        if not isinstance(name, str):
            return None
        return CUSTOM if ":" in name and custom is not None else name

    tagged = [Annotated[table, Tag(name)] for name, table in by_name.items()]
    names = ", ".join(by_name)
    if custom is not None:
        tagged.append(Annotated[custom, Tag(CUSTOM)])
        names += ", or module:function of your own"
    return Annotated[
        Union[tuple(tagged)],  # noqa: UP007 - made at run time
        Discriminator(tag, custom_error_type=f"unknown_{key}", custom_error_message=f"{key} should be {names}"),
    ]
