"""The text of a reply while its tokens come: whole characters only, and nothing from a stop text on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any


class Reply:
    """Turns tokens into text. ``stop``: texts that end the reply and are no part of it.

    ``before``: tokens that the reply goes on from. SentencePiece writes no space before the first word of a text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(text for text in stop if text)
        self._ids = list(before)
        self._from, self._read = 0, len(self._ids)
        self._held = ""
        self._starts: list[int] = []
        self._open: list[str] = []  # the text up to each token whose characters are not whole yet
        self._length = 0
        self._ended = False
        self.text = ""
        self.stopped = False

    def feed(self, tokens: Sequence[int]) -> str:
        """Add tokens; the new text that can be shown now ("" while a character or a stop text may be unfinished)."""
        shown = ""
        for token in tokens:
            if self.stopped:
                break
            self._ids.append(token)
            shown += self._pass(self._grown())
        return shown

    def end(self) -> str:
        """No more tokens come: the text that was held back."""
        if self.stopped:
            return ""
        before, after = self._decode(self._from, self._read), self._decode(self._from)
        shown = self._pass(self._settled(before, after))
        if not self.stopped:
            shown += self._held
            self.text += self._held
            self._ended = True
        self._held = ""
        return shown

    @property
    def starts(self) -> Sequence[int]:
        """Where in the text each token begins; of the last ones it may not be known yet."""
        return self._starts

    @property
    def tokens_shown(self) -> int:
        """How many tokens begin within the text shown so far; all of them once the reply has ended by itself.

        What is held back, and what belongs to a stop text, is not counted.
        """
        return len(self._starts) if self._ended else bisect_left(self._starts, len(self.text))

    def _grown(self) -> str:
        """What the last tokens add, once they make whole characters; decoded with those before, for the spaces."""
        before, after = self._decode(self._from, self._read), self._decode(self._from)
        self._open.append(after)
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        grown = self._settled(before, after)
        self._from, self._read = self._read, len(self._ids)
        return grown

    def _settled(self, before: str, after: str) -> str:
        """Note where the open tokens begin, now that their text is known, and return what it adds to ``before``."""
        covered = 0
        for view in self._open:
            self._starts.append(self._length + covered)
            # Half a character decodes to U+FFFD: what stays of a view is as far as its tokens have come.
            covered = max(covered, _alike(view, after) - len(before))
        self._open.clear()
        self._length += max(0, len(after) - len(before))
        return after[len(before) :]

    def _decode(self, begin: int, end: int | None = None) -> str:
        return str(self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True))

    def _pass(self, grown: str) -> str:
        """Show what cannot be the beginning of a stop text; cut at one."""
        self._held += grown
        places = [(place, text) for text in self._stop if (place := self._held.find(text)) >= 0]
        if places:
            self.stopped = True
            shown, self._held = self._held[: min(places)[0]], ""
        else:
            keep = max((_overlap(self._held, text) for text in self._stop), default=0)
            shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += shown
        return shown


def _alike(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
