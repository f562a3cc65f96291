"""Parquet that a stranger may have written: what its rows would take is known before one of them is decoded.

A column of equal values is a few bytes on the disk, whatever its length. The footer says how many values there are;
of texts, which a dictionary holds once, the dictionary says how long they are.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.conformance import check_types
from pipeline.errors import ArtifactDamaged, ArtifactTooLarge
from pipeline.reading import open_regular

UNREADABLE = (pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
"""What the libraries raise for a file that is not what it claims to be; a panic is no Exception."""
MOST_BYTES = 64 << 20
"""What the rows of one artifact may take however small its files are; those of the demo take 2 MB."""
MOST_OF_MEMORY = 256
"""They may also take this fraction of the machine's memory: a large machine trains large batches."""
MOST_OF_FILES = 64
"""And so many times the size of the files: rows that take room on the disk are no bomb."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 16}
"""Physical type -> bytes of a decoded value; of a text, what polars keeps beside it."""
FIXED = ""
"""Stands for everything of a part that is no text: its size is known exactly."""
BATCH_ROWS = 4096


def check_parts(parts: Mapping[Path, int | None], schema: pa.Schema | None = None) -> None:
    """Check what the footers of parts say: types, number of rows, and what all rows would take. Read-only.

    Args:
        parts: path -> the number of rows that the manifest states; None = it is not compared.
        schema: the documented columns; None = types are not compared.

    Raises:
        ArtifactDamaged: when a footer cannot be read, or says another number of rows.
        ArtifactTooLarge: when the rows would fill the memory although the files are small.
        SchemaError: when a column has another type than the documented one.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = max(MOST_BYTES, memory // MOST_OF_MEMORY, MOST_OF_FILES * sum(path.stat().st_size for path in parts))
    sizes: dict[tuple[Path, str], int] = {}
    for path, rows in parts.items():
        with _open_part(path) as file:
            found = file.metadata.num_rows
            if rows is not None and found != rows:
                raise ArtifactDamaged(f"{path} has {found:,} rows, its manifest says {rows:,}: {REMEDY}")
            if schema is not None:
                check_types(file.schema_arrow, schema, path)
            sizes |= {(path, column): size for column, size in _most_decoded(file.metadata).items()}
    bound, known = sum(sizes.values()), 0
    for path, column in sorted(sizes, key=lambda key: -sizes[key]):
        if bound <= most:
            return
        size = sizes[path, column]
        if column != FIXED:
            with explained(path):
                size = _text_bytes(path, column, most)
        bound -= sizes[path, column] - size
        known += size
        if known > most:
            raise ArtifactTooLarge(
                f"the rows of {path} and the parts beside it would take {known:,} bytes of memory or more, their files "
                f"are far smaller: expected at most {most:,} bytes on this machine; if you trust who made them, read "
                "them on a machine with more memory"
            )


@contextmanager
def explained(path: Path, remedy: str = "") -> Iterator[None]:
    """Turn whatever a library raises for a file that cannot be read into one ArtifactDamaged."""
    try:
        yield
    except UNREADABLE as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ArtifactDamaged(f"{path} cannot be read ({lines[0]}): {remedy or REMEDY}") from error


REMEDY = "it is no Parquet file of this program; restore it from a copy, or do not trust who made it"


def _open_part(path: Path) -> pq.ParquetFile:
    with explained(path):
        open_regular(path).close()
        return pq.ParquetFile(path)


def _most_decoded(metadata: pq.FileMetaData) -> dict[str, int]:
    """Return the most that each column of texts can take, as if every text were the whole dictionary, and the rest."""
    sizes = {FIXED: 0}
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        for index in range(rows.num_columns):
            column = rows.column(index)
            count = max(column.num_values, rows.num_rows, 0)
            sizes[FIXED] += count * WIDTHS.get(column.physical_type, 16)
            if column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
                name, size = column.path_in_schema, max(column.total_uncompressed_size, 0)
                sizes[name] = sizes.get(name, 0) + (size * count if column.has_dictionary_page else size)
    return sizes


def _text_bytes(path: Path, column: str, most: int) -> int:
    """Return the size of all texts of a column, whose dictionary alone is decoded; it stops beyond ``most``."""
    import pyarrow.compute as pc  # few files come so far, and it is slow to import

    taken = 0
    with pq.ParquetFile(path, read_dictionary=[column]) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
            for values in batch.columns:
                while not pa.types.is_dictionary(values.type) and values.type.num_fields:
                    is_struct = pa.types.is_struct(values.type)
                    values = values.field(0) if is_struct else values.flatten()  # one leaf was asked for
                if pa.types.is_dictionary(values.type):
                    taken += pc.sum(pc.take(pc.binary_length(values.dictionary), values.indices)).as_py() or 0
                else:
                    taken += values.nbytes
            if taken > most:
                break
    return taken
