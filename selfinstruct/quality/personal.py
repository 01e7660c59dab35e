"""Text that looks personal: e-mail addresses, phone numbers, and numbers of cards, accounts and persons.

What cannot belong to anybody has a kind of its own, ``example_email`` and so on: reserved domains, numbers set aside
for fiction, documentation and tests, numbers that count (123-456-7890) or whose check digits are wrong. Every pattern
takes time linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Address

from selfinstruct.quality import check_digits
from selfinstruct.quality.phones import phone_numbers
from selfinstruct.records import EXAMPLE, Span

_EMAIL = re.compile(
    r"(?<![\w.%+@-])(?<!://anonymous:)(?<!://ftp:)[\w.%+-]{1,64}+@((?:[^\W_][\w-]{0,62}+\.){1,8}[A-Za-z]{2,24})(?![\w-])",
)
# RFC 2606 and its like under other endings (example.co.uk, exemplo.com.br)
_NOBODYS_DOMAIN = re.compile(r"(?:^|\.)(?:(?:example|exemplo)(?:\.[a-z]{2,4}){0,2}|test|invalid|localhost)$")
_FILE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")  # logo@2x.png

_MANY_DIGITS = re.compile(r"[0-9](?:[ .()/-]{0,3}[0-9]){6}")
_BEFORE, _AFTER = r"(?<![\w.,/+-])", r"(?![\w-]|[.,/][0-9])"

_CARD = re.compile(
    rf"{_BEFORE}(?:(?:1234|[3-6][0-9]{{3}})(?P<gap>[ -])[0-9]{{4}}(?P=gap)[0-9]{{4}}(?P=gap)[0-9]{{4}}"
    r"|[2-6][0-9]{3}(?:[ -]?[0-9]{4}){2}[ -]?[0-9]{2,4}"
    rf"|3[0-9]{{3}}[ -]?[0-9]{{6}}[ -]?[0-9]{{4,5}}){_AFTER}"
)
_ISSUED = re.compile(
    "3[47][0-9]{13}|3(?:0[0-5]|[68][0-9])[0-9]{11}|(?:35|5[0-5]|2[2-7])[0-9]{14}|[46][0-9]{15}"
)  # American Express; Diners; JCB, Mastercard; Visa, Discover and UnionPay
_TEST_CARDS = frozenset(
    "4111111111111111 4242424242424242 4012888888881881 4000056655665556 4222222222222 5555555555554444 "
    "5105105105105100 5200828282828210 2223003122003222 378282246310005 371449635398431 378734493671000 "
    "6011111111111117 6011000990139424 30569309025904 38520000023237 3056930009020004 3530111333300000 "
    "3566002020360505 4012000033330026 5424000000000015".split()
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}")
_EXAMPLE_IBANS = frozenset(
    "GB29NWBK60161331926819 GB82WEST12345698765432 DE89370400440532013000 FR1420041010050500013M02606 "
    "ES9121000418450200051332 PT50000201231234567890154 NL91ABNA0417164300 BE68539007547034 "
    "BR1800360305000010009795493C1 IT60X0542811101000000123456 CH9300762011623852957".split()
)
_SSN = re.compile(
    rf"{_BEFORE}[0-9]{{3}}-[0-9]{{2}}-[0-9]{{4}}{_AFTER}"
    rf"|\b(?i:SSN)\b\D{{0,10}}?(?P<named>[0-9]{{3}}[ -]?[0-9]{{2}}[ -]?[0-9]{{4}}){_AFTER}"
)
_ROUND = re.compile("..0-.0-...0")  # 100-20-3000: amounts or sizes
_GIVEN_SSN = re.compile("(?!000|666|9)...(?!00)..(?!0000)")
_EXAMPLES = frozenset("078051120 219099999 123456789 12345678909 11222333000181 12345678000195".split())
_CPF = re.compile(
    rf"{_BEFORE}[0-9]{{3}}\.[0-9]{{3}}\.[0-9]{{3}}-[0-9]{{2}}{_AFTER}"
    rf"|\b(?i:CPF)\b\D{{0,10}}?(?P<named>[0-9]{{11}}){_AFTER}"
)
_CNPJ = re.compile(
    rf"{_BEFORE}[0-9A-Z]{{2}}\.[0-9A-Z]{{3}}\.[0-9A-Z]{{3}}/[0-9A-Z]{{4}}-[0-9]{{2}}{_AFTER}"
    rf"|\b(?i:CNPJ)\b\D{{0,10}}?(?P<named>[0-9][0-9A-Z]{{11}}[0-9]{{2}}){_AFTER}"
)
_CNPJ_NAMES = ("CNPJ", "cnpj", "Cnpj")  # what follows may hold few digits
_NIF = re.compile(rf"\b(?i:NIF|NIPC|contribuinte)\b\D{{0,12}}?([1235689][0-9]{{2}} ?[0-9]{{3}} ?[0-9]{{3}}){_AFTER}")
_EVERYBODYS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"})  # public name servers
_SHORTEST_ADDRESS = 9  # below, it is as likely the number of a section or a release: 3.2.1.4
_ADDRESS = re.compile(r"(?<![\w.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w-]|\.[0-9])")


def personal(text: str) -> Iterator[Span]:
    """Personal-looking spans of a text, the surest first; they may overlap."""
    if "@" in text:
        for found in _EMAIL.finditer(text):
            if not found[0].lower().startswith("git@") and not found[1].lower().endswith(_FILE_ENDINGS):
                yield Span(*found.span(), _kind("email", not _NOBODYS_DOMAIN.search(found[1].lower())))
    if _MANY_DIGITS.search(text) or any(name in text for name in _CNPJ_NAMES):
        yield from _numbers(text)
        for start, end, is_example in phone_numbers(text):
            yield Span(start, end, _kind("phone", not is_example))
    if text.count(".") >= 3:
        for found in _ADDRESS.finditer(text):
            if _is_public(found[0]):
                yield Span(*found.span(), "ip_address")


def _kind(kind: str, is_somebodys: bool) -> str:
    return kind if is_somebodys else EXAMPLE + kind


def _numbers(text: str) -> Iterator[Span]:
    """Numbers with check digits or a form of their own."""
    for found in _CARD.finditer(text):
        digits = _digits(found[0])
        if _ISSUED.fullmatch(digits) and check_digits.luhn(digits):
            yield Span(*found.span(), _kind("credit_card", digits not in _TEST_CARDS))
        elif found["gap"]:
            yield Span(*found.span(), _kind("credit_card", False))
    for found in _IBAN.finditer(text):
        yield from _iban(found)
    for found in _CPF.finditer(text):
        group = "named" if found["named"] else 0
        digits = _digits(found[group])
        is_right = len(set(digits)) > 1 and check_digits.cpf(digits) and digits not in _EXAMPLES
        yield Span(*found.span(group), _kind("cpf", is_right))
    for found in _CNPJ.finditer(text):
        group = "named" if found["named"] else 0
        places = "".join(c for c in found[group] if c.isalnum())
        is_right = len(set(places)) > 1 and check_digits.cnpj(places) and places not in _EXAMPLES
        yield Span(*found.span(group), _kind("cnpj", is_right))
    for found in _NIF.finditer(text):
        digits = _digits(found[1])
        yield Span(*found.span(1), _kind("nif", check_digits.nif(digits) and digits not in _EXAMPLES))
    for found in _SSN.finditer(text):
        group = "named" if found["named"] else 0
        digits = _digits(found[group])
        if not group and _ROUND.fullmatch(found[0]):
            continue
        yield Span(*found.span(group), _kind("ssn", bool(_GIVEN_SSN.match(digits)) and digits not in _EXAMPLES))


def _iban(found: re.Match[str]) -> Iterator[Span]:
    """The IBAN that a run of letters, digits and single spaces begins with, by the length that its country has."""
    length = check_digits.iban_length(found[0][:2])
    ends = [place for place, c in enumerate(found[0], start=1) if c != " "]
    if 0 < length <= len(ends):
        end = ends[length - 1]
        places = found[0][:end].replace(" ", "")
        if not found[0][end : end + 1].isalnum():
            is_right = check_digits.iban(places) and places not in _EXAMPLE_IBANS
            yield Span(found.start(), found.start() + end, _kind("iban", is_right))


def _is_public(address: str) -> bool:
    if len(address) < _SHORTEST_ADDRESS:
        return False
    try:
        found = IPv4Address(address)
    except ValueError:
        return False
    return found.is_global and not found.is_multicast and address not in _EVERYBODYS


def _digits(text: str) -> str:
    return "".join(c for c in text if "0" <= c <= "9")
