"""Opening a published dataset, for notebooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfinstruct.dataset import batches, store
from selfinstruct.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict


def load(
    path: str | os.PathLike[str],
    version: str = "latest",
    split: str | None = "train",
    *,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    verify: bool = True,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Open a version of the dataset in ``path`` as a Hugging Face dataset.

    Args:
        path: the folder that ``selfinstruct generate`` wrote; ``path@v2`` names a version too.
        version: "latest", or a name such as "v2".
        split: "train", "validation", or None for a dictionary of all splits.
        streaming: read while iterating instead of loading first.
        columns: only these columns.
        verify: compare every file with the hash in the manifest first (0.1 s for 100 MB).

    Raises UsageError for an unknown version, split or column, DamagedFile for a file that was changed.
    """
    import datasets

    name = os.fspath(path)
    if version == "latest" and "@" in name and not Path(name).exists():
        name, _, version = name.rpartition("@")
    found = store.find(Path(name), version)
    if verify:
        store.verify(found)
    files = {s: [str(file) for file in found.files(s)] for s in store.SPLITS if found.files(s)}
    if split is not None and split not in files:
        raise UsageError(f"{name}@{found.name}: has no split {split!r}", hint=f"it has {', '.join(files)}")
    options: dict[str, Any] = {}
    if columns is not None:
        options["columns"] = list(columns)
        there = batches.columns([file for s in store.SPLITS for file in found.files(s)]).names
        unknown = [column for column in options["columns"] if column not in there]
        if unknown:
            raise UsageError(f"{name}@{found.name}: has no column {unknown[0]!r}", hint=f"it has {', '.join(there)}")
    opened: Dataset | DatasetDict | IterableDataset | IterableDatasetDict = datasets.load_dataset(
        "parquet", data_files=files, split=split, streaming=streaming, **options
    )
    return opened
