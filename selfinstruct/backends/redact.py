"""Keeps the key out of everything that is shown or stored, also when a server repeats it, in part or in base64."""

from __future__ import annotations

import base64
import re
from urllib.parse import quote

_PART = 8  # characters of the key that give a word away
_LONG_KEY = 12  # shorter ones are placeholders such as EMPTY: blotting them out of answers would damage text
_WORD = re.compile(r"\S+")


class Redactor:
    """Blots out one key. With no key, or a placeholder shorter than 4 characters, everything passes."""

    def __init__(self, key: str | None) -> None:
        key = key if key and len(key) >= 4 else ""
        self._forms = [form for form in _forms(key) if form] if key else []
        told = [form.casefold() for form in [*self._forms, key.encode().hex()]] if key else []
        self._parts = {form[i : i + _PART] for form in told for i in range(max(1, len(form) - _PART + 1))}
        self._in_text = [form for form in self._forms if len(key) >= _LONG_KEY]

    def quote(self, said: object, limit: int = 300) -> str:
        """What a server said, fit to be shown: one printable line, cut, every word that holds some of the key gone."""
        try:
            text = str(said)[:4000]
        except RecursionError:
            text = "(nested too deeply to be shown)"
        text = "".join(c if c.isprintable() else " " for c in text)
        if self._parts:
            text = _WORD.sub(self._word, text)
        return text[:limit]

    def answer(self, text: str) -> str:
        """An answer's text without the key; nearly always the same text."""
        for form in self._in_text:
            if form in text:
                text = text.replace(form, "***")
        return text

    def _word(self, match: re.Match[str]) -> str:
        word = match.group()
        folded = word.casefold()
        return "***" if any(part in folded for part in self._parts) else word


def _forms(key: str) -> list[str]:
    """The key as it is and percent-encoded, and the core of its base64 at each of the three offsets."""
    encoded = [base64.b64encode(b"\0" * skip + key.encode()).decode() for skip in range(3)]
    # The first characters mix with what stands before the key, the last with what follows it.
    cores = [text[(0, 2, 3)[skip] : len(text) - 4] for skip, text in enumerate(encoded)]
    return [key, quote(key, safe=""), *(core for core in cores if len(core) >= _PART)]
