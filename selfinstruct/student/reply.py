"""The text of a reply while its tokens come: whole characters only, and nothing from a stop text on."""

from __future__ import annotations

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
        self._lengths: list[int] = []  # characters of text after each token
        self._length = 0
        self.text = ""
        self.stopped = False

    def feed(self, tokens: Sequence[int]) -> str:
        """Add tokens; the new text that can be shown now ("" while a character or a stop text may be unfinished)."""
        shown = ""
        for token in tokens:
            if self.stopped:
                break
            self._ids.append(token)
            grown = self._grown()
            self._length += len(grown)
            self._lengths.append(self._length)
            shown += self._pass(grown)
        return shown

    def end(self) -> str:
        """No more tokens come: the text that was held back."""
        if self.stopped:
            return ""
        rest = self._decode(self._from)[len(self._decode(self._from, self._read)) :]
        shown = self._pass(rest)
        if not self.stopped:
            shown += self._held
            self.text += self._held
        self._held = ""
        return shown

    @property
    def tokens_in_text(self) -> int:
        """How many of the tokens begin within the text: those of a stop text are not counted."""
        return sum(1 for before in [0, *self._lengths[:-1]][: len(self._lengths)] if before < len(self.text))

    def _grown(self) -> str:
        """What the last tokens add, once they make whole characters; decoded with those before, for the spaces."""
        before, after = self._decode(self._from, self._read), self._decode(self._from)
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._from, self._read = self._read, len(self._ids)
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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
