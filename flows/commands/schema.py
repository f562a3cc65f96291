"""`grpo schema`: the datasets and their columns, with what they mean. Also makes docs/datasets.md."""

from typing import Annotated, Any

import typer

from flows.commands.options import Output
from flows.printing import Format, print_rows, say
from pipeline.errors import UsageError

WRITES = False


def schema(
    dataset: Annotated[str | None, typer.Argument(metavar="[DATASET]", help="For example completions.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="All datasets as the tables of docs/datasets.md.")
    ] = False,
    format_: Output = Format.table,
) -> None:
    """Print the datasets, or the columns of one with their meaning. Read-only.

    Example: grpo schema completions
    """
    from pipeline.chain import known_schemas

    if markdown:
        for line in schema_markdown().splitlines():
            say(line)
        return
    if dataset is None:
        print_rows([{"dataset": name, "doc": _doc(schema)} for name, schema in known_schemas().items()], format_)
        return
    if dataset not in known_schemas():
        raise UsageError(f"there is no dataset {dataset!r}: choose one of {', '.join(known_schemas())}")
    rows = [
        {"column": field.name, "type": _type(field.type), "nullable": field.nullable, "doc": _doc(field)}
        for field in known_schemas()[dataset]
    ]
    print_rows(rows, format_)


def schema_markdown() -> str:
    """Return `docs/datasets.md`'s tables: every dataset and column with its documentation. Read-only."""
    from pipeline.chain import known_schemas

    lines: list[str] = []
    for name, schema in known_schemas().items():
        lines += [f"## {name}", "", _doc(schema), "", "| column | type | null | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {field.name} | {_type(field.type)} | {'yes' if field.nullable else ''} | {_markdown(_doc(field))} |"
            for field in schema
        ]
        lines.append("")
    return "\n".join(lines)


def _markdown(text: str) -> str:
    return text.replace("|", "\\|")


def _type(type_: Any) -> str:
    """Return an Arrow type without the names of list elements."""
    return str(type_).replace("element: ", "").replace("item: ", "").replace(" not null", "")


def _doc(carrier: Any) -> str:
    return str(carrier.metadata[b"doc"].decode())
