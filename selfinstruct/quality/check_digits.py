"""Check digits: what tells a card, account or tax number from any other number of its length."""

from __future__ import annotations

_IBAN_LENGTHS = {
    country: int(length)
    for country, length in (
        pair.split(":")
        for pair in (
            "AD:24 AE:23 AL:28 AT:20 AZ:28 BA:20 BE:16 BG:22 BH:22 BR:29 BY:28 CH:21 CR:22 CY:28 CZ:24 DE:22 DK:18 "
            "DO:28 EE:20 EG:29 ES:24 FI:18 FO:18 FR:27 GB:22 GE:22 GI:23 GL:18 GR:27 GT:28 HR:21 HU:28 IE:22 IL:23 "
            "IQ:23 IS:26 IT:27 JO:30 KW:30 KZ:20 LB:28 LC:32 LI:21 LT:20 LU:20 LV:21 LY:25 MC:27 MD:24 ME:22 MK:19 "
            "MR:27 MT:31 MU:30 NL:18 NO:15 PK:24 PL:28 PS:29 PT:25 QA:29 RO:24 RS:22 SA:24 SC:31 SE:24 SI:19 SK:24 "
            "SM:27 ST:25 SV:28 TL:23 TN:24 TR:26 UA:29 VA:22 VG:24 XK:20"
        ).split()
    )
}


def luhn(digits: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def iban_length(country: str) -> int:
    """How many characters an IBAN of a country has; 0 for a country without."""
    return _IBAN_LENGTHS.get(country, 0)


def iban(text: str) -> bool:
    """The check digits of an IBAN without spaces (ISO 13616: 97 divides it, with its first four at the end, plus 1)."""
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def cpf(digits: str) -> bool:
    """Both check digits of a Brazilian person's tax number, 11 digits."""
    return all(
        int(digits[end]) == sum(int(d) * (end + 1 - n) for n, d in enumerate(digits[:end])) * 10 % 11 % 10
        for end in (9, 10)
    )


def cnpj(text: str) -> bool:
    """Both check digits of a Brazilian company's tax number, 14 places; since 2026 the first 12 may be letters too."""
    values = [ord(c) - ord("0") for c in text]
    for end in (12, 13):
        rest = sum(value * ((end - 1 - n) % 8 + 2) for n, value in enumerate(values[:end])) % 11
        if values[end] != (0 if rest < 2 else 11 - rest):
            return False
    return True


def nif(digits: str) -> bool:
    """The check digit of a Portuguese tax number, 9 digits."""
    rest = sum(int(d) * (9 - n) for n, d in enumerate(digits[:8])) % 11
    return int(digits[8]) == (0 if rest < 2 else 11 - rest)
