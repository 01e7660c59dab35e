"""What a server's refusal means for us: one table from status and error code to our errors.

The code comes before the status: an empty account answers 429 like a rate limit, and no retry will fill it.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping

import httpx2

from selfinstruct.errors import (
    AuthenticationFailed,
    ModelNotFound,
    PromptRefused,
    QuotaExhausted,
    RateLimited,
    SelfInstructError,
    TeacherFault,
    TeacherUnreachable,
    TransientFault,
)

_QUOTA = frozenset(
    "insufficient_quota billing_hard_limit_reached billing_not_active account_deactivated insufficient_balance "
    "insufficient_credits".split()
)
_AUTH = frozenset(
    "invalid_api_key api_key_invalid invalid_authentication authentication_error unauthorized permission_denied "
    "unauthenticated".split()
)
_MODEL = frozenset("model_not_found model_not_available".split())
_PROMPT = frozenset(
    "context_length_exceeded content_policy_violation content_filter invalid_prompt string_above_max_length "
    "request_too_large invalid_request_error".split()
)
_RATE = frozenset("rate_limit_exceeded rate_limit_error tokens requests slow_down resource_exhausted".split())
_BUSY_STATUS = frozenset((408, 409, 421, 423, 425, 499))
_NO_CREDIT = re.compile(r"insufficient (balance|credits?|funds|quota)|credit balance is too low", re.IGNORECASE)
_NO_QUOTA = re.compile(r"exceeded your current quota.{0,80}billing", re.IGNORECASE)  # some say so of limits a minute
_WRONG_KEY = re.compile(
    r"(api[ _-]?key|token) (is )?(not valid|invalid)|(invalid|incorrect) api[ _-]?key", re.IGNORECASE
)
_TOO_LONG = re.compile(r"context (length|window|size)|too (long|many tokens)|maximum context", re.IGNORECASE)
_TOO_LARGE = re.compile(r"request (is )?too large|larger than the limit", re.IGNORECASE)
_TRY_AGAIN = re.compile(r"(?:try again|retry) (?:in|after) (\d{1,6}(?:\.\d*)?) ?(ms|s\b|sec)", re.IGNORECASE)
_SECONDS = re.compile(r"(\d{1,9}(?:\.\d*)?|\.\d+)(?: ?s(?:ec|econds?)?)?")
_GO_DURATION = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6}(?:\.\d+)?)s)?(?:(\d{1,9}(?:\.\d+)?)ms)?")
_NO_TLS = frozenset(
    "WRONG_VERSION_NUMBER HTTP_REQUEST UNSUPPORTED_PROTOCOL TLSV1_ALERT_PROTOCOL_VERSION NO_PROTOCOLS_AVAILABLE".split()
)
_LONGEST_WAIT = 30 * 86_400.0  # seconds; a server that asks for more is mistaken

Quote = Callable[[object], str]


def fault_of_status(host: str, response: httpx2.Response, model: str, quote: Quote) -> SelfInstructError:
    """The error that an answer with a status of 3xx, 4xx or 5xx stands for."""
    try:
        decoded = json.loads(response.content)
    except (ValueError, RecursionError):
        decoded = None
    status = response.status_code
    text = response.content[:600].decode("utf-8", "replace")
    said = quote(_message(decoded) or text)
    if 300 <= status < 400:
        return TeacherFault(
            f"{host} answered {status}, a redirect, which is not followed",
            hint="give --base-url the final address",
        )
    return _fault(f"{host} answered {status}: {said}", status, decoded, said, model, retry_after(response.headers))


def fault_of_connection(host: str, error: BaseException, late: str, quote: Quote) -> SelfInstructError:
    """The error behind a timeout of the client, which calls every failure to connect one; ``late`` tells a real one."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    told = next((one for one in reversed(causes) if str(one)), error)
    for one in causes:
        if isinstance(one, ssl.SSLCertVerificationError) or getattr(one, "reason", None) in _NO_TLS:
            return TeacherUnreachable(
                f"{host}: no secure connection ({quote(told)})",
                hint="check the certificate, and whether --base-url must begin with http:// or https://",
            )
    # aiohttp's own timeouts are such by name; a refused connection, say, is an OSError and none.
    foreign = [one for one in causes[1:] if isinstance(one, OSError) or type(one).__module__.startswith("aiohttp")]
    if foreign and not any(isinstance(one, TimeoutError) for one in foreign):
        return TransientFault(f"{host}: {quote(told)}")
    return TransientFault(f"{host}: {late}")


def fault_of_error(host: str, error: object, headers: Mapping[str, str], model: str, quote: Quote) -> SelfInstructError:
    """The error that an error object inside an answer of status 200 stands for; its code may be a status."""
    said = quote(_message(error) or error)
    code = error.get("code") if isinstance(error, dict) else None
    status = int(code) if isinstance(code, int | str) and str(code).isdecimal() and len(str(code)) == 3 else 0
    return _fault(f"{host} answered with an error: {said}", status, error, said, model, retry_after(headers))


def _fault(seen: str, status: int, error: object, said: str, model: str, wait: float | None) -> SelfInstructError:
    """The table. ``status`` is 0 where only words tell; what nothing is known about may be over soon."""
    words = _words(error)
    wait = _wait_in(said) if wait is None else wait
    refused = 400 <= status < 500
    if words & _QUOTA or status == 402 or (refused and (_NO_CREDIT.search(said) or _has_no_quota(said, wait))):
        return _quota(seen)
    if (status == 429 or words & _RATE) and _TOO_LARGE.search(said):
        return PromptRefused(seen, reason="request too large")
    if status == 429 or (status in (0, 403) and words & _RATE):
        return RateLimited(seen, retry_after=wait)
    if words & _PROMPT - {"invalid_request_error"}:
        return PromptRefused(seen, reason=_reason(words, status, said))
    if status in (401, 403) or words & _AUTH or (status == 400 and _WRONG_KEY.search(said)):
        return _authentication(seen)
    if words & _MODEL or (status in (404, 410) and "model" in said.lower()):
        return _model(seen, model)
    if status in (404, 405, 410):
        return TeacherFault(seen, hint="check --base-url: it usually ends with /v1, and --api chat|completions")
    if status == 407:
        return TeacherFault(seen, hint="check the proxy in HTTPS_PROXY or HTTP_PROXY")
    if status >= 500 or status in _BUSY_STATUS or (status == 413 and wait is not None):
        return TransientFault(seen) if wait is None else RateLimited(seen, retry_after=wait)
    if status >= 400 or words & _PROMPT:
        return PromptRefused(seen, reason=_reason(words, status, said))
    return TransientFault(seen)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The wait that the server asks for, in seconds: milliseconds, seconds or an HTTP date; None when it says none.

    A date is compared with the server's own clock, its Date header, where there is one. Nonsense, zero, negative and
    past values, and more than 30 days, count as none: then our own backoff decides. Without these headers, a limit of
    which nothing remains says when it is reset (``x-ratelimit-reset-requests: 6m0s``).
    """
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        number = _SECONDS.fullmatch(value.partition(",")[0].strip(' "'))
        if number:
            seconds = float(number[1]) * scale
        else:
            until = _http_date(value)
            if until is None:
                continue
            seconds = until - (_http_date(headers.get("date", "")) or time.time())
        if 0 < seconds <= _LONGEST_WAIT:
            return seconds
    resets = [
        _go_seconds(headers.get(f"x-ratelimit-reset-{what}", ""))
        for what in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{what}", "").strip() == "0"
    ]
    return max((seconds for seconds in resets if 0 < seconds <= _LONGEST_WAIT), default=None)


def _go_seconds(value: str) -> float:
    """Seconds of a duration as Go writes it (``1h2m3.5s``, ``20ms``), 0.0 for anything else."""
    found = _GO_DURATION.fullmatch(value.strip())
    if not found:
        return 0.0
    return sum(float(part or 0) * scale for part, scale in zip(found.groups(), (3600, 60, 1, 0.001), strict=True))


def _wait_in(said: str) -> float | None:
    """The wait that a message asks for in words, None without."""
    found = _TRY_AGAIN.search(said)
    return (float(found[1]) * (0.001 if found[2].lower() == "ms" else 1.0) or None) if found else None


def _has_no_quota(said: str, wait: float | None) -> bool:
    """True for the sentence about an empty account, unless it says that waiting helps."""
    return wait is None and bool(_NO_QUOTA.search(said))


def _http_date(value: str) -> float | None:
    """Seconds since 1970, None for what is no date. HTTP dates are in UTC, whatever they say."""
    try:
        date = email.utils.parsedate_to_datetime(value)
        return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


_INSIDE = ("error", "errors", "detail", "details")  # where servers put the error object, in lists or not


def _objects(decoded: object, depth: int = 4) -> Iterator[Mapping[str, object]]:
    """The objects of an error body that may say what is wrong, the outermost first."""
    if isinstance(decoded, list):
        for one in decoded[:10]:
            yield from _objects(one, depth - 1)
    elif isinstance(decoded, dict) and depth:
        yield decoded
        for name in _INSIDE:
            yield from _objects(decoded.get(name), depth - 1)


def _words(decoded: object) -> frozenset[str]:
    """What the body calls its error: codes, types, reasons, and an error that is one word."""
    found = {
        value.lower()
        for one in _objects(decoded)
        for name in ("code", "type", "status", "reason", "error")
        if isinstance(value := one.get(name), str) and len(value) <= 80
    }
    return frozenset(found | ({decoded.lower()} if isinstance(decoded, str) and len(decoded) <= 80 else set()))


def _message(decoded: object) -> str:
    """The words of an error body for people; "" where there are none."""
    for one in _objects(decoded):
        for name in ("message", "detail", "error"):
            if isinstance(value := one.get(name), str) and value:
                return value
    return decoded if isinstance(decoded, str) else ""


def _reason(words: frozenset[str], status: int, said: str) -> str:
    """What refused prompts are counted by: one of a few texts, never the server's own words."""
    known = sorted(words & _PROMPT - {"invalid_request_error"})
    if known:
        return known[0].replace("_", " ")
    return "context length exceeded" if _TOO_LONG.search(said) else f"status {status}"


def _quota(seen: str) -> QuotaExhausted:
    return QuotaExhausted(seen, hint="the account has no credit left: top it up or use another key, then resume")


def _authentication(seen: str) -> AuthenticationFailed:
    return AuthenticationFailed(seen, hint="check the key in the variable that --api-key-env names")


def _model(seen: str, model: str) -> ModelNotFound:
    return ModelNotFound(seen, hint=f"the endpoint does not serve {model!r}; name one it has with --teacher")
