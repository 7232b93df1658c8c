"""Rows of Parquet files, read with pyarrow; class labels of Hugging Face's datasets are read as their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfcli.errors import UserError
from tfcli.text.read import hf_data
from tfcli.text.read.rows import Form, Row

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH = 1024
"""Rows per read."""


def opened(path: Path, name: str, seen: Callable[[bytes], object] | None) -> tuple[Form, ParquetFile]:
    """Open a file and return its form; with ``seen``, the file is read whole and its bytes are passed to it."""
    import pyarrow
    import pyarrow.parquet

    with _readable(name):
        if seen is None:
            table = pyarrow.parquet.ParquetFile(path)
        else:
            seen(data := path.read_bytes())
            table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        schema = table.schema_arrow
        strings = tuple(field.name for field in schema if _is_string(field.type))
        return Form(kind="parquet", columns=tuple(schema.names), strings=strings), table


def rows(table: ParquetFile, name: str, columns: Sequence[str] | None) -> Iterator[Row]:
    """Yield the rows of an opened file, with only ``columns`` if given, and close it."""
    with _readable(name), table:
        features = _features(table.schema_arrow, columns)
        number = 0
        for batch in table.iter_batches(columns=None if columns is None else list(columns), batch_size=BATCH):
            for values in hf_data.with_names(batch.to_pylist(), features):
                number += 1
                yield Row(where=f"{name}: row {number}", values=values)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: of classes that datasets cannot read
        raise UserError(f"{name} is not a readable Parquet file: {error}") from None


def _is_string(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _features(schema: Any, columns: Sequence[str] | None) -> dict[str, Any]:
    """Return the datasets features of the columns that may contain class labels."""
    chosen = [field.name for field in schema if not _is_string(field.type) and field.name in (columns or schema.names)]
    if not chosen or b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    features = Features.from_arrow_schema(schema)
    return {name: feature for name, feature in features.items() if name in chosen}
