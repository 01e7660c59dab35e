"""The compiled engine: `_core.c` through ctypes, with the results of `vectorized` at about a tenth of its cost."""

from __future__ import annotations

import ctypes
import functools
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from selfinstruct.novelty.answers import KEPT, Novelty, Profile

_ASK, _OFFER, _ADD = 0, 1, 2
_TEXTS_A_CALL = 1024  # the GIL is held during a call: at most some 10 ms for texts of ordinary length
_LONGEST_TEXT = 2**32 - 16  # bytes


def find_core() -> Path | None:
    """The library that setup.py built into this folder, or None; the suffix depends on the platform."""
    suffixes = {".so", ".pyd", ".dylib", ".dll"}
    built = [path for path in Path(__file__).parent.glob("_core*") if path.suffix in suffixes]
    return min(built, default=None)


@functools.cache
def _load(path: Path) -> ctypes.PyDLL:
    # PyDLL keeps the GIL, so two threads never meet inside one pool; releasing it would also cost more than a search.
    library = ctypes.PyDLL(str(path))
    pointer, uint32, double = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_double
    numbers, rows, scores = ctypes.POINTER(uint32), ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(double)
    signatures: dict[str, tuple[object, list[object]]] = {
        "open": (pointer, [double]),
        "close": (None, [pointer]),
        "rows": (ctypes.c_int64, [pointer]),
        "row": (ctypes.c_int64, [pointer, uint32, ctypes.c_char_p, ctypes.c_int64]),
        "read": (ctypes.c_int, [pointer, ctypes.c_char_p, numbers, uint32, ctypes.c_int, rows, scores]),
        "profile": (ctypes.c_int64, [pointer, ctypes.c_char_p, uint32, uint32, numbers, scores, scores]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"selfinstruct_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class CompiledEngine:
    """One C pool. Raises MemoryError when C ran out of memory; the pool then refuses all later work."""

    name = "compiled"

    def __init__(self, threshold: float) -> None:
        path = find_core()
        if path is None:
            raise ImportError(
                "the compiled novelty engine is not built; with a C compiler installed, run "
                "`pip install --force-reinstall --no-deps --no-binary selfinstruct selfinstruct`, or in a checkout "
                "`pip install --force-reinstall --no-deps -e .`; engine='numpy' gives the same results without it"
            )
        self._core = _load(path)
        self._pool = self._core.selfinstruct_open(threshold)
        if not self._pool:
            raise MemoryError("no memory for a novelty pool")
        weakref.finalize(self, self._core.selfinstruct_close, self._pool)
        self._length, self._row, self._score = ctypes.c_uint32(), ctypes.c_int64(), ctypes.c_double()
        self._single = ctypes.byref(self._length), 1, ctypes.byref(self._row), ctypes.byref(self._score)

    def __len__(self) -> int:
        return int(self._core.selfinstruct_rows(self._pool))

    def offer(self, texts: Sequence[str]) -> list[Novelty]:
        if len(texts) == 1:
            return [self._read_one(texts[0], _OFFER)]
        return self._read(texts, _OFFER)

    def query(self, text: str) -> Novelty:
        return self._read_one(text, _ASK)

    def add(self, texts: Sequence[str]) -> None:
        self._read(texts, _ADD)

    def _read_one(self, text: str, mode: int) -> Novelty:
        encoded = text.encode()
        self._length.value = _checked_length(encoded)
        length, count, row, score = self._single
        if self._core.selfinstruct_read(self._pool, encoded, length, count, mode, row, score):
            raise MemoryError("the novelty pool ran out of memory")
        nearest = self._row.value
        return KEPT if nearest < 0 else Novelty(False, self._score.value, nearest)

    def _read(self, texts: Sequence[str], mode: int) -> list[Novelty]:
        answers: list[Novelty] = []
        for start in range(0, len(texts), _TEXTS_A_CALL):
            encoded = [text.encode() for text in texts[start : start + _TEXTS_A_CALL]]
            count = len(encoded)
            lengths = (ctypes.c_uint32 * count).from_buffer(array("I", map(_checked_length, encoded)))
            rows, scores = (ctypes.c_int64 * count)(), (ctypes.c_double * count)()
            if self._core.selfinstruct_read(self._pool, b"".join(encoded), lengths, count, mode, rows, scores):
                raise MemoryError("the novelty pool ran out of memory")
            found = zip(rows, scores, strict=True)
            answers += [KEPT if row < 0 else Novelty(False, score, row) for row, score in found]
        return answers

    def profile(self, text: str, k: int) -> Profile:
        encoded = text.encode()
        k = min(k, len(self))
        rows, scores, total = (ctypes.c_uint32 * max(k, 1))(), (ctypes.c_double * max(k, 1))(), ctypes.c_double()
        found = self._core.selfinstruct_profile(
            self._pool, encoded, _checked_length(encoded), max(k, 1), rows, scores, ctypes.byref(total)
        )
        if found < 0:
            raise MemoryError("the novelty pool ran out of memory")
        if not found:
            return Profile(0.0, [], 0.0)
        return Profile(scores[0], list(zip(rows[:k], scores[:k], strict=True)), total.value / len(self))

    def rows(self) -> Iterator[str]:
        buffer = ctypes.create_string_buffer(4096)
        for row in range(len(self)):
            needed = self._core.selfinstruct_row(self._pool, row, buffer, len(buffer))
            if needed > len(buffer):
                buffer = ctypes.create_string_buffer(needed)
                self._core.selfinstruct_row(self._pool, row, buffer, needed)
            yield ctypes.string_at(buffer, needed).decode()


def _checked_length(encoded: bytes) -> int:
    if len(encoded) > _LONGEST_TEXT:
        raise ValueError(f"a text of {len(encoded)} bytes is too long to compare; the limit is {_LONGEST_TEXT}")
    return len(encoded)
