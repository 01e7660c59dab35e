"""Phone numbers: international ones by their country code, national ones by the forms that nothing else has.

Others (``912 345 678``) only after a word such as "phone" or "telemóvel". Numbers that are set aside for fiction (555,
Ofcom's), that count or repeat or cannot exist are examples; free ones (1-800) are nobody's own and not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

Whose = Literal["person", "example", "nobody"]

_FEW = 4  # different digits
_BEFORE, _AFTER = r"(?<![\w.,/+-])", r"(?![\w-]|[.,/][0-9])"
_COUNTRIES = re.compile(
    "1|7|2(?:0|7|1[1-368]|[2-6][0-9]|9[017-9])|3(?:[0-469]|5[0-9]|7[0-8]|8[0-35-79])|4(?:[013-9]|2[013])"
    "|5(?:[1-8]|0[0-9]|9[0-9])|6(?:[0-6]|7[02-9]|8[0-35-9]|9[0-2])|8(?:[1246]|5[0-356]|80|86)"
    "|9(?:[0-58]|6[0-8]|7[0-79]|9[2-68])"
)
_INTERNATIONAL = re.compile(r"(?<![\w+])\+\(?[1-9](?:[ .()/-]{0,3}+[0-9]){8,14}(?![\w-]|[.,][0-9])")
# With a gap somewhere: bar codes and numbers filled up with zeros have none.
_ABROAD = re.compile(
    r"(?<![\w.,/+-])00[1-9](?=[0-9]{0,12}[ .()-])(?:[ .()-]{0,3}+[0-9]){8,12}(?![ .-]?[0-9]|[\w-]|[.,/][0-9])"
)
_NORTH_AMERICAN = re.compile(
    rf"{_BEFORE}(?:1[ .-])?(?:\([0-9]{{3}}\)[ -]?[0-9]{{3}}[ .-]|[0-9]{{3}}([.-])[0-9]{{3}}\1)[0-9]{{4}}{_AFTER}"
)
_FICTION = re.compile(rf"{_BEFORE}555-[0-9]{{4}}{_AFTER}")
_YEARS = r"(?:19|20)[0-9]{2}[ -](?:19|20)[0-9]{2}"
_BRAZILIAN = re.compile(
    rf"{_BEFORE}(?:\(0?[1-9]{{2}}\) ?(?!{_YEARS})(?:9?[0-9]{{4}}[ -][0-9]{{4}}|9 ?[0-9]{{4}}[ -]?[0-9]{{4}})"
    rf"|[1-9]{{2}} 9[0-9]{{4}}-[0-9]{{4}}){_AFTER}"
)
_WITH_TRUNK_ZERO = re.compile(rf"{_BEFORE}\(?0[1-9][0-9]{{1,3}}\)?(?:[ -][0-9]{{3,6}}){{1,3}}(?! ?[0-9]){_AFTER}")
_NAMED = re.compile(
    r"\b(?:(?:tele)?phone|mobile|cell(?:phone)?|tel|tl[mf]|fax|telefone|tel[eé]fono|telem[oó]vel|m[oó]vil|celular|contac?to|ligue|whatsapp)\b"
    r"(?:[ \t]{1,2}(?:numbers?|no|is|are|at|n[º°]|número|é|para)\b){0,2}+[.:#=]{0,2}[ \t\"']{0,3}"
    rf"(?P<number>\(?[0-9](?:[ .()-]{{0,3}}+[0-9]){{6,14}}){_AFTER}",
    re.IGNORECASE,
)
_FORMS = (_INTERNATIONAL, _ABROAD, _NORTH_AMERICAN, _FICTION, _BRAZILIAN, _WITH_TRUNK_ZERO, _NAMED)
_FREE = ("800", "833", "844", "855", "866", "877", "888")
_FREE_WITH_TRUNK_ZERO = ("0800", "0808")
_FREE_ABROAD = re.compile("(?:31|32|33|34|39|41|43|44|49|55|351)0?800|(?:34)900|(?:33)0?805|(?:44)0?808")
_COUNTING = "01234567890123456789", "98765432109876543210"


def phone_numbers(text: str) -> Iterator[tuple[int, int, bool]]:
    """Where phone numbers begin and end, and whether they are examples; they may overlap."""
    for pattern in _FORMS:
        for found in pattern.finditer(text):
            group = "number" if pattern is _NAMED else 0
            whose = _whose("".join(c for c in found[group] if "0" <= c <= "9"), pattern)
            if whose != "nobody":
                yield *found.span(group), whose == "example"


def _whose(digits: str, form: re.Pattern[str]) -> Whose:
    """Whose number these digits can be, seen in this form."""
    counts = any(digits[-7:] in row for row in _COUNTING) or len(set(digits)) < _FEW
    if form is _INTERNATIONAL:
        return _whose_international(digits, counts)
    if form is _ABROAD or (form is _NAMED and digits.startswith("00")):
        return "nobody" if form is _ABROAD and counts else _whose_international(digits[2:], counts)
    if form is _WITH_TRUNK_ZERO and (len(digits) not in (10, 11) or len(set(digits)) < _FEW):
        return "nobody"  # 0110 1001 1010 is no phone number
    if form in (_WITH_TRUNK_ZERO, _NAMED) and digits.startswith("0"):
        if _is_british_fiction(digits):
            return "example"
        return "nobody" if digits.startswith(_FREE_WITH_TRUNK_ZERO) else "example" if counts else "person"
    if form is _FICTION or counts:
        return "example"
    local = digits[-10:] if digits[:-10] in ("", "1") else digits
    if form is _NORTH_AMERICAN:
        return _whose_north_american(local)
    if form is _NAMED and local.startswith(_FREE) and len(local) in (9, 10):
        return "nobody"
    return "example" if local.startswith("555") or (len(local) == 10 and local[3:6] == "555") else "person"


def _whose_international(digits: str, counts: bool) -> Whose:
    country = _COUNTRIES.match(digits)
    if not country or len(digits) < 10:
        return "nobody"
    if counts or (country[0] == "44" and _is_british_fiction("0" + digits[2:].lstrip("0"))):
        return "example"
    if country[0] == "1":
        return _whose_north_american(digits[1:]) if len(digits) == 11 else "nobody"
    return "nobody" if _FREE_ABROAD.match(digits) else "person"


def _whose_north_american(digits: str) -> Whose:
    area, exchange = digits[:3], digits[3:6]
    if area in _FREE:
        return "nobody"
    exists = all(code[0] in "23456789" and code[1:] != "11" and code != "555" for code in (area, exchange))
    return "person" if exists else "example"


def _is_british_fiction(digits: str) -> bool:
    """Numbers that Ofcom keeps for drama."""
    return digits.startswith(("02079460", "07700900", "08081570", "0909879", "03069990")) or digits[4:8] == "4960"
