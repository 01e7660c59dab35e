"""What the disk refuses, as an error of ours that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfinstruct.errors import OutputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """OutputError with the path for an OSError inside: Python's own names no file when a disk is full."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error})", hint="free disk space, or choose another -o"
        ) from error
