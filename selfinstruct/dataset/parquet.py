"""Writing Parquet so that a disk that fails is told once: pyarrow's writer tries again, aloud, when it is collected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


@contextmanager
def open_writer(path: Path | IO[bytes], columns: pa.Schema) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetWriter`` for a path or an open file, closed at the end. Raises OSError."""
    import pyarrow.parquet as pq

    writer = pq.ParquetWriter(path, columns, compression="zstd")
    try:
        yield writer
        writer.close()
    finally:
        if writer.is_open:
            with suppress(OSError):
                writer.close()
            writer.is_open = False
