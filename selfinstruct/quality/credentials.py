"""Text that looks like a key or a password: tokens of known makers, private keys, passwords in URLs and assignments.

Placeholders (keys with EXAMPLE or 1234 in them, ``user:password@``) have a kind of their own: ``example_api_key``.
Every pattern takes time linear in the text: what repeats is bounded or possessive, and begins where a word does.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

from selfinstruct.records import EXAMPLE, Span

# What a maker's tokens begin with, and how they go on. The beginnings are looked for first, as plain text.
_MAKERS = {
    "sk-": "(?=(?:[A-Za-z_-]*+[0-9]){2})[A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic, DeepSeek; not a CSS class
    "AKIA": "[A-Z2-7]{16}",  # AWS
    "ASIA": "[A-Z2-7]{16}",
    "ghp_": "[A-Za-z0-9]{36,}",  # GitHub
    "gho_": "[A-Za-z0-9]{36,}",
    "ghu_": "[A-Za-z0-9]{36,}",
    "ghs_": "[A-Za-z0-9]{36,}",
    "ghr_": "[A-Za-z0-9]{36,}",
    "github_pat_": "[A-Za-z0-9_]{40,}",
    "glpat-": "[A-Za-z0-9_.-]{20,}",  # GitLab
    "xoxa-": "[A-Za-z0-9-]{20,}",  # Slack
    "xoxb-": "[A-Za-z0-9-]{20,}",
    "xoxp-": "[A-Za-z0-9-]{20,}",
    "xoxs-": "[A-Za-z0-9-]{20,}",
    "xapp-": "[A-Za-z0-9-]{20,}",
    "hooks.slack.com/services/": "[A-Za-z0-9/]{30,}",
    "AIza": "[A-Za-z0-9_-]{33,40}",  # Google
    "GOCSPX-": "[A-Za-z0-9_-]{28}",
    "ya29.": "[A-Za-z0-9_-]{30,}",
    "hf_": "[A-Za-z0-9]{30,}",  # Hugging Face
    "gsk_": "[A-Za-z0-9]{40,}",  # Groq
    "xai-": "[A-Za-z0-9]{40,}",
    "sk_live_": "[A-Za-z0-9]{16,}",  # Stripe
    "rk_live_": "[A-Za-z0-9]{16,}",
    "sk_test_": "[A-Za-z0-9]{16,}",
    "whsec_": "[A-Za-z0-9+/=]{24,}",
    "npm_": "[A-Za-z0-9]{36}",
    "pypi-": "[A-Za-z0-9_-]{60,}",
    "SG.": r"[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",  # SendGrid
    "dop_v1_": "[a-f0-9]{64}",  # DigitalOcean
    "doo_v1_": "[a-f0-9]{64}",
    "dor_v1_": "[a-f0-9]{64}",
    "dapi": "[a-f0-9]{32}(?:-[0-9])?",  # Databricks
    "shpat_": "[A-Fa-f0-9]{32}",  # Shopify
    "shpca_": "[A-Fa-f0-9]{32}",
    "shppa_": "[A-Fa-f0-9]{32}",
    "shpss_": "[A-Fa-f0-9]{32}",
    "ATATT3x": "[A-Za-z0-9_=-]{100,400}",  # Atlassian
    "r8_": "[A-Za-z0-9]{37}",  # Replicate
    "pplx-": "[A-Za-z0-9]{40,64}",  # Perplexity
    "lin_api_": "[A-Za-z0-9]{40}",  # Linear
    "secret_": "[A-Za-z0-9]{43}",  # Notion
    "ntn_": "[0-9]{11}[A-Za-z0-9]{35}",
    "sq0atp-": "[A-Za-z0-9_-]{22}",  # Square
    "sq0csp-": "[A-Za-z0-9_-]{43}",
    "SK": "[a-f0-9]{32}",  # Twilio
    "key-": "[a-f0-9]{32}",  # Mailgun
    "discord.com/api/": "(?:v[0-9]{1,2}/)?webhooks/[0-9]{17,20}/[A-Za-z0-9_-]{60,100}",
    "discordapp.com/api/": "(?:v[0-9]{1,2}/)?webhooks/[0-9]{17,20}/[A-Za-z0-9_-]{60,100}",
    "eyJ": r"[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]{8,}",  # JSON Web Token
}
_TOKENS = {
    start: re.compile(rf"{re.escape(start)}(?<![A-Za-z0-9_-]{re.escape(start)})(?:{rest}+)(?![A-Za-z0-9_])")
    for start, rest in _MAKERS.items()
}
# Bots' tokens begin with a number of theirs and with no word: Discord's in base64, so with M, N or O.
_TELEGRAM_BOT = re.compile(r"(?:(?<=/bot)|(?<![\w:-]))[0-9]{8,10}:(A[A-Za-z0-9_-]{34})(?![\w-])")
_DISCORD_BOT = re.compile(r"(?<![\w.-])[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.([A-Za-z0-9_-]{27,38})(?![\w-])")
_ENDS_LIKE_DISCORD = re.compile(r"\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27}")  # looked for first: it is quicker
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{11,40}+(?:(?<=PRIVATE KEY)|(?<=PRIVATE KEY BLOCK))-----"
    r"(?:[\s\\]*+[A-Z][A-Za-z-]{2,20}: [^\n]{0,200}+){0,4}+"  # Proc-Type: 4,ENCRYPTED
    r"(?:[\s\\]*+[A-Za-z0-9+/=]{16,}+)++"
    r"(?:[\s\\]*+[A-Za-z0-9+/=]{1,15}+)?+(?:[\s\\]*+n?-----END [A-Z ]{1,40}+-----)?+"
)
_IN_URL = re.compile(r"://([^\s/:@\"'<>{}$]{0,64}+):([^\s/@\"'<>{}\[\]]{3,128}+)@[\w.\[-]")
_BEARER = re.compile(r"\bbearer[ \t]{1,4}([A-Za-z0-9._~+/=-]{20,400})(?![\w])", re.IGNORECASE)
_BASIC = re.compile(
    r"\bauthorization\b[\"']?[ \t]{0,4}[:=,][ \t]{0,4}[\"']?basic[ \t]{1,4}([A-Za-z0-9+/]{8,400}={0,2})(?![\w])",
    re.IGNORECASE,
)
# "pass" alone is a word of its own (a mountain pass is ...), so it wants a sign after it.
_ASSIGNED = re.compile(
    r"(?:(?P<password>pass(?:word|wd|phrase|code)|pwd|senha|palavra-passe|contrase[nñ]a"
    r"|(?:(?<![^\W\d_])|(?<=db))pass(?=[\"'\]]{0,2}[ \t]{0,4}(?:=>|:=|[=:])))"
    r"|secret|token|credential|(?:api|access|private|auth|account|encryption)[ _-]?key)s?"
    r"(?:[_-][a-z0-9]{1,20}+){0,3}+[\"'\]]{0,2}[ \t]{0,4}(?:=>|:=|[=:]|\b(?:is|é|es)\b)[ \t]{0,4}"
    r"(?:\"(?P<double>[^\"\s]{6,200}+)\"|'(?P<single>[^'\s]{6,200}+)'"
    r"|(?P<bare>[^\s\"'`,;()<>{}\[\]]{6,200}+)(?=[\s\"'`,;)]|$))",
    re.IGNORECASE,
)
_NAMES = (
    *"pass pwd senha contrase secret token credential _key -key apikey accesskey accountkey".split(),
    "api key",
    "access key",
)
_PLACEHOLDER = re.compile(
    r"example|exemplo|sample|dummy|placeholder|your|here|insert|change.?me|replace|x{4}|0{5}",
    re.IGNORECASE,
)
_COUNTING = re.compile("abc|123", re.IGNORECASE)  # in keys; people do put it into their passwords
_PATH = re.compile(r"~?/|\.{1,2}/|[A-Za-z]:\\")  # pwd is also the working folder
_TEMPLATE = re.compile(r"[<>{}]|^\$|\*{3}|\.{3}")
_SHORTEST_KEY, _SHORTEST_PART, _PARTS = 16, 8, re.compile("[_.:-]")
_SAYS_LITTLE = 40  # characters of a token that are searched: in long ones "your" turns up by chance
_EXAMPLE_PAYLOAD = "eyJzdWIiOiIxMjM0NTY3ODkwI"  # the payload that jwt.io and its readers show
_EVERYBODY = ("anonymous", "ftp")  # may log in with any password
_TEXTBOOK_LOGIN = "Aladdin:open sesame"  # RFC 7617's
_NO_PASSWORDS = frozenset("pass password passwd passphrase pwd secret senha mypassword user username token".split())


def credentials(text: str) -> Iterator[Span]:
    """Keys, tokens and passwords in a text, the surest first; they may overlap."""
    if "-----BEGIN " in text:
        for found in _PRIVATE_KEY.finditer(text):
            yield Span(*found.span(), "private_key")
    for start, pattern in _TOKENS.items():
        if start in text:
            for found in pattern.finditer(text):
                yield _span("api_key", *found.span(), found[0].removeprefix(start))
    yield from _bots(text)
    if "://" in text and "@" in text:
        for found in _IN_URL.finditer(text):
            if found[1].lower() not in _EVERYBODY:
                yield _span("password", *found.span(2), found[2])
    lower = text.lower()
    if "bearer" in lower:
        for found in _BEARER.finditer(text):
            if _is_random(found[1]):
                yield _span("api_key", *found.span(1), found[1])
    if "basic" in lower:
        yield from _basic(text)
    if any(word in lower for word in _NAMES):
        yield from _assigned(text)


def _bots(text: str) -> Iterator[Span]:
    patterns = [_TELEGRAM_BOT] * (":A" in text) + [_DISCORD_BOT] * bool(_ENDS_LIKE_DISCORD.search(text))
    for pattern in patterns:
        for found in pattern.finditer(text):
            if _is_random(found[1]):
                yield _span("api_key", *found.span(), found[1])


def _basic(text: str) -> Iterator[Span]:
    """Names and passwords of HTTP, in base64."""
    for found in _BASIC.finditer(text):
        try:
            login = base64.b64decode(found[1], validate=True).decode()
        except ValueError:
            continue
        _, colon, password = login.partition(":")
        if colon:
            is_example = login == _TEXTBOOK_LOGIN or _is_placeholder(password)
            yield Span(*found.span(1), EXAMPLE + "password" if is_example else "password")


def _span(kind: str, start: int, end: int, secret: str) -> Span:
    is_example = _is_placeholder(secret) or (kind == "api_key" and _COUNTING.search(secret[:_SAYS_LITTLE]))
    return Span(start, end, EXAMPLE + kind if is_example else kind)


def _assigned(text: str) -> Iterator[Span]:
    """Values given to something that is called a password, secret, token or key."""
    for found in _ASSIGNED.finditer(text):
        name = found.lastgroup or "bare"
        value, start = found[name].rstrip(".") if name == "bare" else found[name], found.start(name)
        is_password = bool(found["password"])
        is_name = _PATH.match(value) if is_password else _is_name(value)
        if _is_random(value) and not is_name:
            yield _span("password" if is_password else "api_key", start, start + len(value), value)


def _has_digit(text: str) -> bool:
    return any("0" <= c <= "9" for c in text)


def _is_name(text: str) -> bool:
    """True for names such as ``max_tokens_per_1_minute`` or ``keys/2/mine``: no part is long and holds digits."""
    parts = text.split("/") if text.lower() == text else [text]
    return len(text) < _SHORTEST_KEY or not any(
        len(part) >= _SHORTEST_PART and _has_digit(part) and not part.isdigit()
        for some in parts
        for part in _PARTS.split(some)
    )


def _is_random(text: str) -> bool:
    """True for digits and letters, half of them different, that are no template such as ``<password1>``."""
    has_letter = any("a" <= c <= "z" or "A" <= c <= "Z" for c in text)
    return has_letter and _has_digit(text) and len(set(text)) >= min(8, len(text) // 2) and not _TEMPLATE.search(text)


def _is_placeholder(text: str) -> bool:
    """True for a secret that says that it is none, as "your-key-1", or that is a word for passwords, as "password1"."""
    if _PLACEHOLDER.search(text[:_SAYS_LITTLE]) or _EXAMPLE_PAYLOAD in text or len(set(text)) < min(8, len(text) // 2):
        return True
    return len(text) <= _SAYS_LITTLE and "".join(c for c in text.lower() if c.isalpha()) in _NO_PASSWORDS
