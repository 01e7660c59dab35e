"""One OpenAI-compatible endpoint, one attempt at a time: the openai client, with its behaviour pinned down.

The client retries nothing and follows no redirect; each attempt has a total
deadline (the client's timeout is per read) and a body limit. Every fault becomes one of our errors here and nowhere
else; retries live in ``retry.py``. Texts of servers are shown cut, printable and without the key.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2
import openai

from selfinstruct.backends.base import is_loopback, scrub
from selfinstruct.backends.body import limit_body
from selfinstruct.backends.deadline import awake_timeout
from selfinstruct.backends.faults import fault_of_connection, fault_of_error, fault_of_status
from selfinstruct.backends.redact import Redactor
from selfinstruct.errors import PromptRefused, SelfInstructError, TransientFault, UnusableAnswer
from selfinstruct.records import Completion, Finish, Prompt

# Our own deadline does the rest: the client's would not know whether this process was awake.
_PATIENT = httpx2.Timeout(None, connect=15.0)
_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_FINISH: dict[str, Finish] = {"length": "length", "max_tokens": "length", "content_filter": "refused"}  # else "stop"
_BROKEN_OFF = frozenset(("error", "abort", "aborted", "cancelled", "canceled", "timeout"))
# What the client makes itself. Its variables (OPENAI_CUSTOM_HEADERS, ...) are meant for OpenAI, not for every server.
_OUR_HEADERS = frozenset(
    "accept accept-encoding authorization connection content-length content-type host transfer-encoding "
    "user-agent".split()
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the teacher draws its words. ``min_p`` is sent only when set: OpenAI does not know it."""

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float | None = None


class HttpBackend:
    """Asks one endpoint. ``timeout`` is the total time of an attempt in seconds."""

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key: str | None,
        api: Literal["chat", "completions"],
        sampling: Sampling,
        timeout: float,
        max_in_flight: int,
        token_limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",  # noqa: S107 (no password)
        schema_style: Literal["response_format", "json_schema"] = "response_format",
    ) -> None:
        self.name = model
        self.host = urlsplit(base_url).netloc
        self.max_in_flight = max_in_flight
        self._model, self._api, self._sampling, self._timeout = model, api, sampling, timeout
        self._redact = Redactor(api_key)
        self._quote = self._redact.quote
        self._token_limit_name, self._schema_style = token_limit_name, schema_style
        self._authorization = f"Bearer {api_key or 'none'}"
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or "none",  # the client insists; a local server ignores it
            organization=None,
            max_retries=0,
            timeout=_PATIENT,
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAioHttpClient(
                follow_redirects=False,
                trust_env=not is_loopback(base_url),  # no proxy of the environment gets to see what stays here
                timeout=_PATIENT,
                limits=httpx2.Limits(max_connections=max_in_flight + 8, max_keepalive_connections=max_in_flight),
                event_hooks={"request": [self._keep_ours], "response": [limit_body]},
            ),
        )

    async def complete(self, prompt: Prompt) -> Completion:
        """Ask once. Raises TransientFault, RateLimited, PromptRefused or a TeacherFault."""
        start = time.monotonic()
        answer = await self._post(self._body(prompt))
        try:
            return self._completion(prompt, answer, time.monotonic() - start)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            raise UnusableAnswer(f"{self.host}: an answer without a usable choice: {self._quote(answer)}") from None

    async def _keep_ours(self, request: httpx2.Request) -> None:
        """Request hook: no header of the environment goes out with the prompt, whatever its variables say."""
        for name in [name for name in request.headers if name.lower() not in _OUR_HEADERS]:
            if not name.lower().startswith("x-stainless-"):
                del request.headers[name]
        request.headers["Authorization"] = self._authorization

    def halt(self) -> None:
        """Nothing waits here."""

    async def aclose(self) -> None:
        await self._client.close()

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "temperature": self._sampling.temperature}
        body[self._token_limit_name] = prompt.max_new_tokens
        if self._sampling.top_p != 1:
            body["top_p"] = self._sampling.top_p
        if self._sampling.min_p is not None:
            body["min_p"] = self._sampling.min_p
        if prompt.messages is not None:
            body["messages"] = [dict(message) for message in prompt.messages]
        else:
            body["prompt"] = prompt.text
        if prompt.stop:
            body["stop"] = list(prompt.stop)
        if prompt.seed is not None:
            body["seed"] = prompt.seed
        if prompt.schema is not None:
            body |= self._schema(prompt.schema)
        return body

    def _schema(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        if self._schema_style == "json_schema":
            return {"json_schema": schema}
        wrapped = {"name": "tasks", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": wrapped}}

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """One POST; the decoded JSON object, or an error of ours. This is the border: nothing else gets out."""
        start = time.monotonic()
        try:
            async with awake_timeout(self._timeout):
                response = await self._client.post(_PATHS[self._api], body=body, cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            raise fault_of_status(self.host, error.response, self._model, self._quote) from None
        except (TimeoutError, openai.APITimeoutError) as error:
            said = f"no answer within {time.monotonic() - start:.3g} s"
            raise fault_of_connection(self.host, error, said, self._quote) from None
        except SelfInstructError:
            raise
        except openai.APIConnectionError as error:
            raise TransientFault(f"{self.host}: {self._quote(error.__cause__ or error)}") from None
        except Exception as error:  # noqa: BLE001 (the border: the client lets foreign errors through)
            raise TransientFault(f"{self.host}: {type(error).__name__}: {self._quote(error)}") from None
        try:
            answer = json.loads(response.content)
        except (ValueError, RecursionError):
            said = self._quote(response.content[:600].decode("utf-8", "replace"))
            raise UnusableAnswer(f"{self.host}: the answer is no JSON: {said}") from None
        if not isinstance(answer, dict):
            raise UnusableAnswer(f"{self.host}: the answer is no JSON object: {self._quote(answer)}")
        choices = answer.get("choices")
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        wrong = answer.get("error") or first.get("error")  # gateways put it beside half a text
        if wrong:
            raise fault_of_error(self.host, wrong, response.headers, self._model, self._quote)
        return answer

    def _completion(self, prompt: Prompt, answer: dict[str, Any], seconds: float) -> Completion:
        choice = answer["choices"][0]
        reason = choice.get("finish_reason")
        text = choice["message"]["content"] if self._api == "chat" else choice["text"]
        if self._api == "chat" and choice["message"].get("refusal"):
            raise PromptRefused(f"{self.host}: the model refused the prompt", reason="refused by the model")
        if reason in _BROKEN_OFF:
            raise UnusableAnswer(f"{self.host}: the answer was broken off (finish_reason {reason!r})")
        finish = _FINISH.get(reason, "stop") if isinstance(reason, str) else "stop"
        if finish == "refused":
            raise PromptRefused(f"{self.host}: the content filter cut the answer", reason="content filter")
        if not isinstance(text, str) or not text.strip():
            if finish == "length":
                raise UnusableAnswer(
                    f"{self.host}: the token limit ({prompt.max_new_tokens}) was used up before any text, as by a "
                    "model that thinks first",
                    hint="begin a new run with --set max_new_tokens=N, several times as many",
                )
            raise UnusableAnswer(f"{self.host}: an empty answer")
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        details = usage.get("prompt_tokens_details")
        model = answer.get("model")
        return Completion(
            request_no=prompt.request_no,
            text=self._redact.answer(scrub(text)),
            finish=finish,
            prompt_tokens=_count(usage.get("prompt_tokens")),
            cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
            completion_tokens=_count(usage.get("completion_tokens")),
            model=self._redact.answer(scrub(model))[:200] if isinstance(model, str) else self._model,
            seconds=round(seconds, 6),
        )


def _count(value: object) -> int:
    """A token count as the server reports it, 0 for anything that is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40 else 0
