"""Texts to tokens, by a named rule.

`rouge` is rouge_score's own rule (its default tokenizer without the stemmer): lower case, then the maximal runs of
`[a-z0-9]`. It splits accented words and sees nothing at all in Chinese, Russian or Hindi. `unicode` gives the same
tokens on ASCII text and is meant for every other language. The name goes into a run's identity: another rule keeps
other rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_SEPARATOR, _WORD, _MARK, _UNSPACED = " ", "w", "m", "u"

# Every byte but [a-z0-9] becomes a space. Encode, translate, split: 1.1 us a row of 10 tokens, rouge_score 6 to 15.
_ASCII_RULE = bytes(code if chr(code) in "abcdefghijklmnopqrstuvwxyz0123456789" else 0x20 for code in range(256))

# Blocks of the scripts that are written without spaces between words (UAX 29 leaves them to dictionaries): Thai, Lao,
# Myanmar, Khmer, Tai Le to Khmer symbols, Tai Tham, kana and the CJK blocks, Tai Viet, half-width kana, ideographs.
_UNSPACED_BLOCKS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19FF), (0x1A20, 0x1AAF), (0x2E80, 0x2FDF),
    (0x3000, 0x312F), (0x3190, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAADF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D),
    (0x11700, 0x1174F), (0x16FE0, 0x18D7F), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
_TOKEN = re.compile(f"{_UNSPACED}{_MARK}*|[{_WORD}{_MARK}]+")


class _CharacterClasses(dict[int, str]):
    """Code point -> one class letter, filled as characters are met (all 1.1 million at once would cost 0.3 s)."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))[0]
        if category == "M":
            letter = _MARK
        elif category not in "LN":
            letter = _SEPARATOR
        elif any(first <= code <= last for first, last in _UNSPACED_BLOCKS):
            letter = _UNSPACED
        else:
            letter = _WORD
        self[code] = letter
        return letter


_CLASSES = _CharacterClasses()


def rouge_tokens(text: str) -> list[str]:
    """The tokens that `rouge_score.tokenize.tokenize(text, stemmer=None)` gives, for any string (lone surrogates too).

    Lower-casing comes first: U+212A (Kelvin sign) gives `k` and U+0130 gives `i`, as they do there.
    """
    return text.lower().encode("ascii", "replace").translate(_ASCII_RULE).decode("ascii").split()


def unicode_tokens(text: str) -> list[str]:
    """Maximal runs of letters, marks and digits of any script, in NFC and lower case; as `rouge_tokens` on ASCII text.

    In scripts without spaces each character, with the marks that follow it, is a token of its own.
    Canonically equal texts (composed or decomposed accents) give equal tokens. Punctuation, symbols and emoji separate.
    """
    if text.isascii():
        return rouge_tokens(text)
    lowered = unicodedata.normalize("NFC", text).lower()
    return [lowered[found.start() : found.end()] for found in _TOKEN.finditer(lowered.translate(_CLASSES))]


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"rouge": rouge_tokens, "unicode": unicode_tokens}


def for_language(language: str) -> str:
    """Name of the tokenizer for a language code: `rouge` for English (`en`, `en-GB`, ...), `unicode` for all others."""
    return "rouge" if re.split("[-_]", language.lower())[0] == "en" else "unicode"
