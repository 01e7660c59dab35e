"""The engine that runs everywhere: numpy for the search, rapidfuzz for the last comparisons; `compiled`'s results.

The method is that of `_core.c`. Texts are searched in chunks, first in the pool, then among each other, because a numpy
call costs 1 us however short its arrays are. A text that comes alone takes a shorter way through the same index.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from selfinstruct.novelty.answers import Novelty, Profile
from selfinstruct.novelty.bounds import LONGEST_INDEXED, Bounds, Numbers, least_matches_many
from selfinstruct.novelty.comparisons import Best, Row, common_tokens, row_of, rows_of
from selfinstruct.novelty.prefixes import Growing, Pairs, Prefixes, PrefixIndex
from selfinstruct.novelty.rouge import f_measure, least_matches
from selfinstruct.novelty.signatures import WIDE_FROM, Bags, Signatures, bag_of, possible, sign
from selfinstruct.novelty.term_profile import TermProfile
from selfinstruct.novelty.tokens import rouge_tokens

_CHUNK = 256  # texts searched together
_BLOCK = 65536  # texts added together


class _Vocabulary(dict[str, int]):
    """Token -> id; a token not met before gets the next one."""

    def __missing__(self, token: str) -> int:
        self[token] = number = len(self)
        return number


class _Chunk(NamedTuple):
    """Texts of up to LONGEST_INDEXED tokens that are searched together."""

    ids: list[list[int]]
    rows: list[Row]
    flat: Numbers  # (sum of lengths,) token ids
    lengths: Numbers  # (t,)
    bags: Bags
    prefixes: Prefixes


class VectorizedEngine:
    """A pool in numpy arrays."""

    name = "numpy"

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._vocabulary = _Vocabulary()
        self._index = PrefixIndex(Bounds(threshold))
        self._signatures = Signatures()
        self._rows: list[Row] = []
        self._tokens = array("I")  # of the rows, one after another
        self._lengths = Growing(np.int64)
        self._overlong: list[int] = []  # rows of more than LONGEST_INDEXED tokens, which are not in the index
        self._profile = TermProfile()

    def __len__(self) -> int:
        return len(self._rows)

    def offer(self, texts: Sequence[str]) -> list[Novelty]:
        if len(texts) == 1:
            return [self._offer_one(self._read(texts[0]))]
        answers: list[Novelty] = []
        for start in range(0, len(texts), _CHUNK):
            for ids in _stretches([self._read(text) for text in texts[start : start + _CHUNK]]):
                answers += [self._offer_one(ids[0])] if len(ids) == 1 else self._offer_chunk(self._chunk(ids))
        return answers

    def query(self, text: str) -> Novelty:
        ids = self._look_up(text)
        self._index.meet_tokens(len(self._vocabulary) + 1)
        if len(ids) > LONGEST_INDEXED:
            return self._compare_overlong(ids).answer()
        if len(ids) > WIDE_FROM:
            return self._search(self._chunk([ids]))[0].answer()
        return self._search_short(ids, self._index.ranks_of(ids), bag_of(ids)).answer()

    def add(self, texts: Sequence[str]) -> None:
        for start in range(0, len(texts), _BLOCK):
            for ids in _stretches([self._read(text) for text in texts[start : start + _BLOCK]]):
                if len(ids[0]) > LONGEST_INDEXED:
                    self._append_overlong(ids[0])
                else:
                    self._append(self._chunk(ids), np.arange(len(ids)))

    def profile(self, text: str, k: int) -> Profile:
        profile, lengths, ids = self._profile, self._lengths.view, self._look_up(text)
        if len(profile) < len(self):
            new = lengths[len(profile) :].tolist()
            bounds = pairwise(accumulate(new, initial=len(self._tokens) - sum(new)))
            profile.extend([self._tokens[start:end] for start, end in bounds], len(self._vocabulary))
        matches = common_tokens(row_of(ids), profile.long_rows, self._rows)
        return profile.profile(ids, matches, lengths[profile.long_rows].tolist() if matches else [], k)

    def rows(self) -> Iterator[str]:
        words, end = list(self._vocabulary), 0
        for length in self._lengths.view.tolist():
            yield " ".join([words[token] for token in self._tokens[end : end + length]])
            end += length

    def _read(self, text: str) -> list[int]:
        """Token ids; new tokens enter the vocabulary."""
        return list(map(self._vocabulary.__getitem__, _split(text)))

    def _look_up(self, text: str) -> list[int]:
        """Token ids; all unknown tokens get the first free id, which no row has."""
        return [self._vocabulary.get(token, len(self._vocabulary)) for token in _split(text)]

    def _chunk(self, ids: list[list[int]]) -> _Chunk:
        self._index.meet_tokens(len(self._vocabulary))
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.array([token for text in ids for token in text], np.int64)
        return _Chunk(ids, rows_of(ids, flat), flat, lengths, sign(flat, lengths), self._index.prefixes(flat, lengths))

    def _offer_one(self, ids: list[int]) -> Novelty:
        """A text alone: 76 us at a pool of 52K, where a chunk of one took 220."""
        if len(ids) > LONGEST_INDEXED:
            best = self._compare_overlong(ids)
            if best.row < 0:
                self._append_overlong(ids)
            return best.answer()
        if len(ids) > WIDE_FROM:
            return self._offer_chunk(self._chunk([ids]))[0]
        self._index.meet_tokens(len(self._vocabulary))
        places, bag = self._index.ranks_of(ids), bag_of(ids)
        best = self._search_short(ids, places, bag)
        if best.row < 0:
            self._index.post_one(ids, places, len(self))
            self._signatures.append(bag)
            self._append_tokens(ids, row_of(ids))
            self._freeze_if_due()
        return best.answer()

    def _offer_chunk(self, chunk: _Chunk) -> list[Novelty]:
        bests, pool = self._search(chunk), len(self)
        kept_as: dict[int, int] = {}  # text of the chunk -> row
        among = self._search_among(chunk, [best.row >= 0 for best in bests]) if len(bests) > 1 else {}
        for text, best in enumerate(bests):
            for earlier, score in among.get(text, ()):
                if earlier in kept_as:
                    best.take(score, kept_as[earlier])
            if best.row < 0:
                kept_as[text] = pool + len(kept_as)
        if kept_as:
            self._append(chunk, np.fromiter(kept_as, np.int64, len(kept_as)))
        return [best.answer() for best in bests]

    def _search_short(self, ids: list[int], places: list[int], bag: int) -> Best:
        """The best row for a text of up to WIDE_FROM tokens, given its indexed ranks and its signature."""
        found, need = self._index.search_one(ids, places)
        possible_rows = self._signatures.possible_rows(bag, len(ids), found, need)
        best = Best()
        if possible_rows:
            best.compare(row_of(ids), dict(possible_rows), self._rows)
        self._compare_with_overlong(ids, best)
        return best

    def _search(self, chunk: _Chunk) -> list[Best]:
        """The best row of the pool for each text."""
        bests = [Best() for _ in chunk.ids]
        pairs = possible(self._index.search(chunk.prefixes), chunk.bags, self._signatures.rows)
        for text, needed in _by_text(pairs):
            bests[text].compare(chunk.rows[text], needed, self._rows)
        if self._overlong:
            for ids, best in zip(chunk.ids, bests, strict=True):
                self._compare_with_overlong(ids, best)
        return bests

    def _search_among(self, chunk: _Chunk, rejected: list[bool]) -> dict[int, list[tuple[int, float]]]:
        """By text: the earlier texts that the pool does not reject, with an F above the threshold, and that F."""
        pairs = self._index.join(chunk.prefixes)
        pairs = possible(pairs.take(np.flatnonzero(~np.array(rejected)[pairs.row])), chunk.bags, chunk.bags)
        rows = chunk.rows
        found: dict[int, list[tuple[int, float]]] = {}
        for text, needed in _by_text(pairs):
            for earlier, matches in zip(needed, common_tokens(rows[text], list(needed), rows), strict=True):
                if matches >= needed[earlier]:
                    score = f_measure(matches, len(rows[text]), len(rows[earlier]))
                    found.setdefault(text, []).append((earlier, score))
        return found

    def _compare_with_overlong(self, ids: list[int], best: Best) -> None:
        if ids and self._overlong:
            needed = {row: least_matches(len(ids), len(self._rows[row]), self._threshold) for row in self._overlong}
            able = {row: need for row, need in needed.items() if need <= len(ids)}
            best.compare(row_of(ids), able, self._rows)

    def _compare_overlong(self, ids: list[int]) -> Best:
        """Compares with every row of a length that can match: such texts are rare, and share tokens with most rows."""
        filled = np.flatnonzero(self._lengths.view)
        lengths = self._lengths.view[filled]
        need = least_matches_many(len(ids), lengths, self._threshold)
        able = need <= np.minimum(lengths, len(ids))
        needed = dict(zip(filled[able].tolist(), need[able].tolist(), strict=True))
        return Best().compare(row_of(ids), needed, self._rows)

    def _append(self, chunk: _Chunk, chosen: Numbers) -> None:
        """Makes the chosen texts (in order) the next rows."""
        rows = np.full(len(chunk.ids), -1)
        rows[chosen] = len(self) + np.arange(len(chosen))
        posted = rows[chunk.prefixes.text]
        entering = np.flatnonzero(posted >= 0)
        self._index.post(chunk.prefixes.take(entering), posted[entering])
        self._signatures.extend(chunk.bags, chosen)
        for text in chosen.tolist():
            self._append_tokens(chunk.ids[text], chunk.rows[text])
        self._freeze_if_due()

    def _append_overlong(self, ids: list[int]) -> None:
        self._overlong.append(len(self))
        self._signatures.append(0)
        self._append_tokens(ids, row_of(ids))

    def _append_tokens(self, ids: list[int], row: Row) -> None:
        self._rows.append(row)
        self._lengths.append(len(ids))
        self._tokens.extend(ids)

    def _freeze_if_due(self) -> None:
        if len(self) >= 2 * self._index.frozen_rows + 64:
            lengths = self._lengths.view
            indexed = lengths <= LONGEST_INDEXED
            flat = np.frombuffer(self._tokens, np.uint32).astype(np.int64)
            self._index.freeze(flat[np.repeat(indexed, lengths)], np.where(indexed, lengths, 0))


def _split(text: str) -> list[str]:
    return rouge_tokens(text) if text.isascii() else text.split(" ")


def _stretches(texts: list[list[int]]) -> Iterator[list[list[int]]]:
    """The texts in order, in stretches without overlong ones; each overlong text alone."""
    start = 0
    for t, ids in enumerate(texts):
        if len(ids) > LONGEST_INDEXED:
            if start < t:
                yield texts[start:t]
            yield [ids]
            start = t + 1
    if start < len(texts):
        yield texts[start:]


def _by_text(pairs: Pairs) -> Iterator[tuple[int, dict[int, int]]]:
    """Pairs that are ordered by text, as (text, need by row)."""
    texts, starts = np.unique(pairs.text, return_index=True)
    bounds = [*starts.tolist(), len(pairs.text)]
    rows, needs = pairs.row.tolist(), pairs.need.tolist()
    for text, start, end in zip(texts.tolist(), bounds[:-1], bounds[1:], strict=True):
        yield text, dict(zip(rows[start:end], needs[start:end], strict=True))
