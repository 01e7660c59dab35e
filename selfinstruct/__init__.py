"""Self-instruct data generation: from human seed tasks to a versioned Parquet dataset.

``selfinstruct.load(path)`` opens a dataset in a notebook; everything else is the ``selfinstruct`` command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfinstruct.dataset.load import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import ``load`` when it is asked for: nothing heavy is loaded by ``import selfinstruct`` alone."""
    if name == "load":
        from selfinstruct.dataset.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
