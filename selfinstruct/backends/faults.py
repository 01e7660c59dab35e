"""What a server's refusal means for us: one table from status and error code to our errors.

The code comes before the status: an empty account answers 429 like a rate limit, and no retry will fill it.
"""

from __future__ import annotations

import email.utils
import math
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

_QUOTA = frozenset("insufficient_quota billing_hard_limit_reached billing_not_active account_deactivated".split())
_AUTH = frozenset("invalid_api_key invalid_authentication authentication_error unauthorized permission_denied".split())
_MODEL = frozenset("model_not_found model_not_available".split())
_PROMPT = frozenset(
    "context_length_exceeded content_policy_violation content_filter invalid_prompt string_above_max_length "
    "invalid_request_error".split()
)
_RATE = frozenset("rate_limit_exceeded rate_limit_error tokens requests slow_down".split())
_BUSY_STATUS = frozenset((408, 409, 423, 425))

Quote = Callable[[object], str]


def fault_of_status(host: str, response: httpx2.Response, model: str, quote: Quote) -> SelfInstructError:
    """The error that an answer with a status of 3xx, 4xx or 5xx stands for."""
    status = response.status_code
    try:
        decoded = response.json()
    except (ValueError, RecursionError):
        decoded = None
    error = decoded.get("error", decoded) if isinstance(decoded, dict) else decoded
    words = _words(error)
    said = quote(_message(error) or response.text[:300])
    seen = f"{host} answered {status}: {said}"
    if words & _QUOTA or status == 402:
        return _quota(seen)
    if status == 429:
        return RateLimited(seen, retry_after=retry_after(response.headers))
    if status in (401, 403) or words & _AUTH:
        return _authentication(seen)
    if words & _MODEL or (status == 404 and "model" in said.lower()):
        return _model(seen, model)
    if status == 404 or status == 405:
        return TeacherFault(seen, hint="check --base-url: it usually ends with /v1, and --api chat|completions")
    if 300 <= status < 400:
        return TeacherFault(f"{host} redirects, which is not followed", hint="give --base-url the final address")
    if status >= 500 or status in _BUSY_STATUS:
        wait = retry_after(response.headers)
        return RateLimited(seen, retry_after=wait) if wait is not None else TransientFault(seen)
    return PromptRefused(seen, reason=_reason(words, status))


def fault_of_error(host: str, error: object, model: str, quote: Quote) -> SelfInstructError:
    """The error that an error object inside an answer of status 200 stands for."""
    words = _words(error)
    seen = f"{host} answered with an error: {quote(_message(error) or error)}"
    if words & _QUOTA:
        return _quota(seen)
    if words & _RATE:
        return RateLimited(seen)
    if words & _AUTH:
        return _authentication(seen)
    if words & _MODEL:
        return _model(seen, model)
    if words & _PROMPT:
        return PromptRefused(seen, reason=_reason(words, 200))
    return TransientFault(seen)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The wait that the server asks for, in seconds: milliseconds, seconds or an HTTP date; None when it says none.

    Nonsense, negative and past values count as none: then our own backoff decides.
    """
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    return None


def _words(error: object) -> frozenset[str]:
    if not isinstance(error, dict):
        return frozenset()
    return frozenset(v.lower() for name in ("code", "type") if isinstance(v := error.get(name), str))


def _message(error: object) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return error if isinstance(error, str) else ""


def _reason(words: frozenset[str], status: int) -> str:
    known = sorted(words & _PROMPT - {"invalid_request_error"})
    return known[0].replace("_", " ") if known else f"status {status}"


def _quota(seen: str) -> QuotaExhausted:
    return QuotaExhausted(seen, hint="the account has no credit left: top it up or use another key, then resume")


def _authentication(seen: str) -> AuthenticationFailed:
    return AuthenticationFailed(seen, hint="check the key in the variable that --api-key-env names")


def _model(seen: str, model: str) -> ModelNotFound:
    return ModelNotFound(seen, hint=f"the endpoint does not serve {model!r}; name one it has with --teacher")
