"""Exact ROUGE-L novelty over a growing pool of texts.

    index = RougeLIndex(threshold=0.7)
    index.offer("Give three tips for staying healthy.")      # Novelty(kept=True, score=0.0, nearest_id=None)
    index.offer("Give three tips for staying very healthy.")  # Novelty(kept=False, score=0.923..., nearest_id=0)

The rows that are kept are those that a loop over rouge_score's `fmeasure > threshold` keeps, bit for bit, whatever the
engine and the batch size. An index is meant for one thread at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from selfinstruct.novelty.answers import Engine, Novelty, Profile
from selfinstruct.novelty.compiled import CompiledEngine, find_core
from selfinstruct.novelty.tokens import TOKENIZERS
from selfinstruct.novelty.vectorized import VectorizedEngine

__all__ = ["ENGINES", "Novelty", "Profile", "RougeLIndex"]

ENGINES: Final = ("auto", "compiled", "numpy")
_FORMAT = "selfinstruct-novelty-1"
_LOADED_AT_ONCE = 8192  # texts


def _engine(choice: str, threshold: float) -> Engine:
    if choice == "compiled" or (choice == "auto" and find_core() is not None):
        return CompiledEngine(threshold)
    return VectorizedEngine(threshold)


class RougeLIndex:
    """Texts that differ: `offer` a text and it enters unless a row is too similar, F > `threshold`.

    Args:
        threshold: highest F (0 < threshold <= 1) that two texts may have; at 1.0 nothing is ever rejected.
        tokenizer: a name in `tokens.TOKENIZERS`. A text without tokens has F = 0 with everything and is always kept.
        engine: "compiled", "numpy", or "auto" for the compiled one where it is built. Results are equal.

    Ids are the 0-based order in which rows entered. Raises ValueError for any other argument, ImportError for
    engine="compiled" where it is not built. Memory: about 130 B a row compiled, 450 B numpy, for texts of 10 tokens.
    """

    def __init__(self, threshold: float = 0.7, tokenizer: str = "rouge", engine: str = "auto") -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, not {threshold!r}")
        if tokenizer not in TOKENIZERS:
            raise ValueError(f"unknown tokenizer {tokenizer!r}; choose one of: {', '.join(TOKENIZERS)}")
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; choose one of: {', '.join(ENGINES)}")
        self.threshold: Final = float(threshold)
        self.tokenizer: Final = tokenizer
        self._tokenize = TOKENIZERS[tokenizer]
        self._engine = _engine(engine, self.threshold)
        self.engine: Final = self._engine.name

    def __len__(self) -> int:
        return len(self._engine)

    def offer(self, text: str) -> Novelty:
        """Adds the text if it is new, and says so."""
        return self._engine.offer([self._plain(text)])[0]

    def offer_batch(self, texts: Iterable[str]) -> list[Novelty]:
        """The same answers as offering the texts one by one; costs two thirds (compiled) or half (numpy)."""
        return self._engine.offer([self._plain(text) for text in texts])

    def query(self, text: str) -> Novelty:
        """What `offer` would answer; adds nothing."""
        return self._engine.query(self._plain(text))

    def add(self, text: str) -> int:
        """Adds the text whatever it resembles; returns its id."""
        self._engine.add([self._plain(text)])
        return len(self._engine) - 1

    def profile(self, text: str, k: int = 10) -> Profile:
        """F of the text with every row: maximum, the k highest (ties: the earlier row first) and the mean.

        Costs time linear in the pool; the first call builds an index of its own. The mean is summed in another order
        than np.mean's: equal to about 1e-15. Raises ValueError for k < 0.
        """
        if k < 0:
            raise ValueError(f"k must be 0 or more, not {k}")
        return self._engine.profile(self._plain(text), k)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], threshold: float = 0.7, tokenizer: str = "rouge", engine: str = "auto"
    ) -> RougeLIndex:
        """An index that holds all these texts, unconditionally: a resumed run's kept rows, in their old order."""
        index = cls(threshold, tokenizer, engine)
        index._fill(index._plain(text) for text in texts)
        return index

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows' tokens as UTF-8: a JSON header line, then one line a row. Replaces `path` in one step."""
        header = {"format": _FORMAT, "threshold": self.threshold, "tokenizer": self.tokenizer, "rows": len(self)}
        partial = Path(f"{os.fspath(path)}.partial")
        with partial.open("w", encoding="utf-8", newline="\n") as out:
            out.write(json.dumps(header) + "\n")
            out.writelines(f"{row}\n" for row in self._engine.rows())
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], engine: str = "auto") -> RougeLIndex:
        """The index that `save` wrote, whichever engine did. Raises ValueError for a file that is not whole."""
        with Path(path).open(encoding="utf-8", newline="\n") as lines:
            try:
                header = json.loads(next(lines, ""))
                expected = int(header["rows"]) if header["format"] == _FORMAT else None
            except (ValueError, KeyError, TypeError):
                expected = None
            if expected is None:
                raise ValueError(f"{path} is not a saved novelty index ({_FORMAT})")
            index = cls(header["threshold"], header["tokenizer"], engine)
            index._fill(line[:-1] for line in lines if line.endswith("\n"))
        if len(index) != expected:
            raise ValueError(
                f"{path} is cut off: {len(index)} of {expected} rows; build the index from its texts again"
            )
        return index

    def _plain(self, text: str) -> str:
        return text if text.isascii() else " ".join(self._tokenize(text))

    def _fill(self, plain: Iterable[str]) -> None:
        remaining: Iterator[str] = iter(plain)
        while rows := list(islice(remaining, _LOADED_AT_ONCE)):
            self._engine.add(rows)
