"""Single tokens as an answer names them: the text of each, and the bytes, which many a token ends in mid-character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenNames:
    """What the tokens of one tokenizer add to a text.

    Within a text, that is: SentencePiece writes no space before the first word, and ``at_start`` asks for that form.
    Special tokens keep their names and add no bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self._added = {int(number): (str(one.content), bool(one.special)) for number, one in added.items()}
        self._steps = list(_decoder_steps(tokenizer))
        kinds = {step.get("type") for step in self._steps}
        self._alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        self._has_byte_pieces = "ByteFallback" in kinds
        self._known: dict[int, bytes] = {}

    def raw(self, token: int, *, at_start: bool = False) -> bytes:
        """The bytes that the token adds to the text; joined, those of a reply's tokens are its text."""
        if token not in self._known:
            self._known[token] = self._bytes(token)
        found = self._known[token]
        if at_start and found.startswith(b" ") and not str(self._tokenizer.decode([token])).startswith(" "):
            return found[1:]
        return found

    def text(self, token: int, *, at_start: bool = False) -> str:
        """The token as text; bytes that are no whole character show as U+FFFD."""
        if self._is_special(token):
            return self._added[token][0]
        return self.raw(token, at_start=at_start).decode("utf-8", "replace")

    def key(self, token: int) -> str:
        """The token as a name of its own, as OpenAI's completions write it: "bytes:\\xf0\\x9f" for half a character."""
        raw = self.raw(token)
        try:
            raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{one:02x}" for one in raw)
        return self.text(token)

    def _is_special(self, token: int) -> bool:
        return self._added.get(token, ("", False))[1]

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            content, special = self._added[token]
            return b"" if special else content.encode("utf-8", "replace")
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the embedding that no word belongs to
            return b""
        if self._alphabet is not None and all(char in self._alphabet for char in piece):
            return bytes(self._alphabet[char] for char in piece)
        if self._has_byte_pieces and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for step in self._steps:
            piece = _replaced(piece, step)
        return str(piece).encode("utf-8", "replace")


def _decoder_steps(tokenizer: Any) -> Iterator[Mapping[str, Any]]:
    """How a fast tokenizer makes text of its pieces, step by step; nothing for one that does not say."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return
    waiting = [json.loads(decoder.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        waiting = [*step.get("decoders", ()), *waiting]
        yield step


def _replaced(piece: str, step: Mapping[str, Any]) -> str:
    """SentencePiece's sign for a space, made one again."""
    if step.get("type") == "Metaspace":
        return piece.replace(str(step["replacement"]), " ")
    old = (step.get("pattern") or {}).get("String") if step.get("type") == "Replace" else None
    return piece.replace(old, str(step["content"])) if old else piece


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
