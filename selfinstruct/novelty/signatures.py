"""Bag signatures: from a few machine words of a text and of a row, a bound on how many tokens they can share.

Each token sets one of 64 bits; the common bits of both, and the text's tokens that found their bit taken, bound the
overlap. That drops 95 % of the pairs that the prefix bounds leave. Texts of more than WIDE_FROM tokens fill 64 bits and
have 1,024 as well, where the k-th occurrence of a token has a bit of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from selfinstruct.novelty.bounds import Numbers
from selfinstruct.novelty.prefixes import Growing, Needs, Pairs, Words

WIDE_FROM = 32  # tokens
_WIDE_BITS = 1024
_MULTIPLIER_INT = 0x9E3779B97F4A7C15
_ONE, _MULTIPLIER = np.uint64(1), np.uint64(_MULTIPLIER_INT)
_NO_NUMBERS = np.zeros(0, np.int64)
_NO_WIDE = np.zeros((0, _WIDE_BITS // 64), np.uint64)


class Bags(NamedTuple):
    """Signatures of some texts or rows."""

    narrow: Words  # (t,)
    taken: Numbers  # (t,) tokens whose bit another one had set
    wide_slot: Numbers  # (t,) index into `wide`, -1 without
    wide: Words  # (w, 16)


def _hashed(tokens: Numbers, bits: int) -> Words:
    return np.asarray((tokens.view(np.uint64) * _MULTIPLIER) >> np.uint64(64 - bits))


def _widen(flat: Numbers, lengths: Numbers) -> Words:
    """(t, 16) wide signatures of texts given as flat token ids."""
    text = np.repeat(np.arange(len(lengths)), lengths)
    key = text << 32 | flat
    key.sort()
    here = np.arange(len(key))
    occurrence = here - np.maximum.accumulate(np.where(np.diff(key, prepend=-1) != 0, here, 0))
    places = _hashed((key & 0xFFFFFFFF) + (occurrence << 32), 10).astype(np.int64)
    bits = np.zeros((len(lengths), _WIDE_BITS), np.bool_)
    bits[key >> 32, places] = True
    return np.packbits(bits, axis=1).view(np.uint64)


def sign(flat: Numbers, lengths: Numbers) -> Bags:
    """Signatures of texts; `flat` (sum of lengths,) has their token ids."""
    narrow = np.zeros(len(lengths), np.uint64)
    filled = np.flatnonzero(lengths)
    if len(filled):
        starts = (np.cumsum(lengths) - lengths)[filled]
        narrow[filled] = np.bitwise_or.reduceat(_ONE << _hashed(flat, 6), starts)
    slot, wide = np.full(len(lengths), -1), _NO_WIDE
    if len(flat) > WIDE_FROM:
        long = lengths > WIDE_FROM
        if long.any():
            slot[long] = np.arange(long.sum())
            wide = _widen(flat[np.repeat(long, lengths)], lengths[long])
    return Bags(narrow, lengths - np.bitwise_count(narrow), slot, wide)


def possible(pairs: Pairs, texts: Bags, rows: Bags) -> Pairs:
    """The distinct pairs whose signatures allow `need` common tokens, ordered by text, then row."""
    shared = np.bitwise_count(texts.narrow[pairs.text] & rows.narrow[pairs.row])
    chosen = np.flatnonzero(shared + texts.taken[pairs.text] >= pairs.need)
    pairs = pairs.take(chosen)
    key, first = np.unique(pairs.text << 32 | pairs.row, return_index=True)
    pairs = Pairs(key >> 32, key & 0xFFFFFFFF, pairs.need[first])
    if not len(texts.wide) or not len(rows.wide):
        return pairs
    text_slot, row_slot = texts.wide_slot[pairs.text], rows.wide_slot[pairs.row]
    both = np.flatnonzero((text_slot >= 0) & (row_slot >= 0))
    text_slot, row_slot = text_slot[both], row_slot[both]
    ones = np.bitwise_count(texts.wide).sum(axis=1, dtype=np.int64)
    taken = np.zeros(len(texts.wide), np.int64)
    length = texts.taken + np.bitwise_count(texts.narrow)
    wide_texts = np.flatnonzero(texts.wide_slot >= 0)
    taken[texts.wide_slot[wide_texts]] = length[wide_texts] - ones[texts.wide_slot[wide_texts]]
    shared_wide = np.bitwise_count(texts.wide[text_slot] & rows.wide[row_slot]).sum(axis=1, dtype=np.int64)
    keep = np.ones(len(pairs.text), np.bool_)
    keep[both] = shared_wide + taken[text_slot] >= pairs.need[both]
    return pairs.take(np.flatnonzero(keep))


def bag_of(ids: list[int]) -> int:
    """The 64-bit signature of one text."""
    bag = 0
    for token in ids:
        bag |= 1 << (token * _MULTIPLIER_INT >> 58 & 63)
    return bag


class Signatures:
    """The signatures of a pool's rows."""

    def __init__(self) -> None:
        self._narrow, self._slot = Growing(np.uint64), Growing(np.int64)
        self._wide = Growing(np.uint64, _WIDE_BITS // 64)

    def extend(self, bags: Bags, chosen: Numbers) -> None:
        """Appends those of the chosen texts."""
        self._narrow.extend(bags.narrow[chosen])
        slot = bags.wide_slot[chosen]
        wide = slot >= 0
        if wide.any():
            added = bags.wide[slot[wide]]
            slot[wide] = len(self._wide.view) + np.arange(len(added))
            self._wide.extend(added)
        self._slot.extend(slot)

    def append(self, bag: int) -> None:
        """Appends the row of a text of up to WIDE_FROM tokens."""
        self._narrow.append(np.uint64(bag))
        self._slot.append(-1)

    def possible_rows(self, bag: int, length: int, rows: Words, need: Needs) -> list[tuple[int, int]]:
        """`possible` for one text of up to WIDE_FROM tokens: (row, need) of the rows that remain; rows may repeat."""
        shared = np.bitwise_count(self._narrow.view[rows.view(np.int64)] & np.uint64(bag))
        chosen = (shared + np.uint8(length - bag.bit_count()) >= need).nonzero()[0]
        return list(zip(rows[chosen].tolist(), need[chosen].tolist(), strict=True))

    @property
    def rows(self) -> Bags:
        return Bags(self._narrow.view, _NO_NUMBERS, self._slot.view, self._wide.view)
