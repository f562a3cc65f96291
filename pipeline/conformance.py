"""Checks rows against the documented schemas, on every write and when a stage reads."""

from collections.abc import Iterable, Mapping

import polars as pl
import pyarrow as pa

from pipeline.columns import TOKEN_COLUMNS
from pipeline.errors import SchemaError
from pipeline.schema import SCHEMAS


def conform(frame: pl.DataFrame | pa.Table, name: str, schema: pa.Schema | None = None) -> pa.Table:
    """Return the rows as a table with exactly ``schema``, by default that of the dataset ``name``.

    Raises:
        SchemaError: when columns are missing or unknown, a value does not fit its type, or a null is not allowed.
    """
    table = frame.to_arrow() if isinstance(frame, pl.DataFrame) else frame
    schema = _without_tokens(schema or SCHEMAS[name], table.column_names)
    missing = [n for n in schema.names if n not in table.column_names]
    unknown = [n for n in table.column_names if n not in schema.names]
    if missing or unknown:
        raise SchemaError(
            f"rows for {name} lack the columns {missing} and have the unknown columns {unknown}; "
            f"expected {schema.names}: see `grpo schema {name}`"
        )
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise SchemaError(f"rows for {name} do not fit its schema: {error}; see `grpo schema {name}`") from error
    return table


def check_schema(found: pa.Schema, name: str, where: object, schemas: Mapping[str, pa.Schema] = SCHEMAS) -> None:
    """Raise SchemaError unless ``found`` has exactly the columns and types of the dataset ``name``."""
    if name not in schemas:
        raise SchemaError(
            f"{where} holds {name}, a dataset without a documented schema: expected one of {', '.join(schemas)}; give "
            "the stage that reads it the schema (Stage.schemas)"
        )
    expected = _without_tokens(schemas[name], found.names)
    if found.equals(expected, check_metadata=False):
        return
    differences = [
        f"{field.name}: {found.field(field.name).type if field.name in found.names else 'missing'}, "
        f"expected {field.type}"
        for field in expected
        if field.name not in found.names or not found.field(field.name).equals(field)
    ]
    differences += [f"{n}: unknown column" for n in found.names if n not in expected.names]
    raise SchemaError(
        f"{where} does not have the schema of {name} ({'; '.join(differences) or 'column order differs'}): "
        "it was written by another version of this program, or not by it; make it again or convert it"
    )


def check_types(found: pa.Schema, documented: pa.Schema, where: object) -> None:
    """Raise SchemaError unless every column that is documented has its type, and null only where it may.

    Columns may be missing or unknown: an earlier version of the program had others.
    """
    for field in documented:
        index = found.get_field_index(field.name)
        if index < 0:
            continue
        stored = found.field(index)
        if stored.type != field.type or (stored.nullable and not field.nullable):
            raise SchemaError(
                f"{where} has {field.name} of type {stored.type}{' with nulls' * stored.nullable}, expected "
                f"{field.type}{' with nulls' * field.nullable}: it was not written by this program; make it again "
                "or convert it"
            )


def _without_tokens(schema: pa.Schema, names: Iterable[str]) -> pa.Schema:
    """Return the schema without its token columns if ``names`` has none of them."""
    optional = {field.name for field in TOKEN_COLUMNS}
    if not optional.isdisjoint(names):
        return schema
    return pa.schema([field for field in schema if field.name not in optional], metadata=schema.metadata)
