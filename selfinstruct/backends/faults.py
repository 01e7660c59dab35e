"""What a server's refusal means for us: one table from status and error code to our errors.

The code comes before the status: an empty account answers 429 like a rate limit, and no retry will fill it.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import re
import time
from collections.abc import Callable, Mapping

import httpx2

from selfinstruct.errors import (
    AuthenticationFailed,
    ModelNotFound,
    PromptRefused,
    QuotaExhausted,
    RateLimited,
    SelfInstructError,
    TeacherFault,
    TransientFault,
)

_QUOTA = frozenset(
    "insufficient_quota billing_hard_limit_reached billing_not_active account_deactivated insufficient_balance".split()
)
_AUTH = frozenset("invalid_api_key invalid_authentication authentication_error unauthorized permission_denied".split())
_MODEL = frozenset("model_not_found model_not_available".split())
_PROMPT = frozenset(
    "context_length_exceeded content_policy_violation content_filter invalid_prompt string_above_max_length "
    "invalid_request_error".split()
)
_RATE = frozenset("rate_limit_exceeded rate_limit_error tokens requests slow_down".split())
_BUSY_STATUS = frozenset((408, 409, 421, 423, 425, 499))
_NO_CREDIT = re.compile(r"insufficient (balance|credits?|funds|quota)|credit balance is too low", re.IGNORECASE)
_TOO_LONG = re.compile(r"context (length|window|size)|too (long|many tokens)|maximum context", re.IGNORECASE)
_SECONDS = re.compile(r"\d{1,9}(\.\d*)?|\.\d+")
_LONGEST_WAIT = 30 * 86_400.0  # seconds; a server that asks for more is mistaken

Quote = Callable[[object], str]


def fault_of_status(host: str, response: httpx2.Response, model: str, quote: Quote) -> SelfInstructError:
    """The error that an answer with a status of 3xx, 4xx or 5xx stands for."""
    try:
        decoded = json.loads(response.content)
    except (ValueError, RecursionError):
        decoded = None
    error = decoded.get("error", decoded) if isinstance(decoded, dict) else decoded
    status = response.status_code
    text = response.content[:600].decode("utf-8", "replace")
    said = quote(_message(error) or text)
    if 300 <= status < 400:
        return TeacherFault(
            f"{host} answered {status}, a redirect, which is not followed",
            hint="give --base-url the final address",
        )
    return _fault(f"{host} answered {status}: {said}", status, error, said, model, retry_after(response.headers))


def fault_of_error(host: str, error: object, model: str, quote: Quote) -> SelfInstructError:
    """The error that an error object inside an answer of status 200 stands for; its code may be a status."""
    said = quote(_message(error) or error)
    code = error.get("code") if isinstance(error, dict) else None
    status = int(code) if isinstance(code, int | str) and str(code).isdecimal() and len(str(code)) == 3 else 0
    return _fault(f"{host} answered with an error: {said}", status, error, said, model, None)


def _fault(seen: str, status: int, error: object, said: str, model: str, wait: float | None) -> SelfInstructError:
    """The table. ``status`` is 0 where only words tell; what nothing is known about may be over soon."""
    words = _words(error)
    if words & _QUOTA or status == 402 or (400 <= status < 500 and _NO_CREDIT.search(said)):
        return _quota(seen)
    if status == 429 or (status == 0 and words & _RATE):
        return RateLimited(seen, retry_after=wait)
    if words & _PROMPT - {"invalid_request_error"}:
        return PromptRefused(seen, reason=_reason(words, status, said))
    if status in (401, 403) or words & _AUTH:
        return _authentication(seen)
    if words & _MODEL or (status == 404 and "model" in said.lower()):
        return _model(seen, model)
    if status in (404, 405):
        return TeacherFault(seen, hint="check --base-url: it usually ends with /v1, and --api chat|completions")
    if status == 407:
        return TeacherFault(seen, hint="check the proxy in HTTPS_PROXY or HTTP_PROXY")
    if status >= 500 or status in _BUSY_STATUS:
        return TransientFault(seen) if wait is None else RateLimited(seen, retry_after=wait)
    if status >= 400 or words & _PROMPT:
        return PromptRefused(seen, reason=_reason(words, status, said))
    return TransientFault(seen)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The wait that the server asks for, in seconds: milliseconds, seconds or an HTTP date; None when it says none.

    A date is compared with the server's own clock, its Date header, where there is one. Nonsense, zero, negative and
    past values, and more than 30 days, count as none: then our own backoff decides.
    """
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if _SECONDS.fullmatch(value):
            seconds = float(value) * scale
        else:
            until = _http_date(value)
            if until is None:
                continue
            seconds = until - (_http_date(headers.get("date", "")) or time.time())
        if 0 < seconds <= _LONGEST_WAIT:
            return seconds
    return None


def _http_date(value: str) -> float | None:
    """Seconds since 1970, None for what is no date. HTTP dates are in UTC, whatever they say."""
    try:
        date = email.utils.parsedate_to_datetime(value)
        return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _words(error: object) -> frozenset[str]:
    if not isinstance(error, dict):
        return frozenset()
    return frozenset(v.lower() for name in ("code", "type") if isinstance(v := error.get(name), str))


def _message(error: object) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return error if isinstance(error, str) else ""


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
