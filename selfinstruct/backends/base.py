"""What a backend is: one method that turns a prompt into a completion, or into one of our errors."""

from __future__ import annotations

import ipaddress
import re
from typing import Protocol
from urllib.parse import urlsplit

from selfinstruct.records import Completion, Prompt

_SURROGATE = re.compile("[\ud800-\udfff]")


class Backend(Protocol):
    """A place where prompts are answered.

    ``complete`` raises only errors of our tree: retryable ones, PromptRefused for this prompt alone, or a
    TeacherFault that ends the run. After ``halt`` nothing more is sent: a ``complete`` that still waits to send raises
    Stopped, and what was sent may arrive.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_in_flight(self) -> int: ...

    async def complete(self, prompt: Prompt) -> Completion: ...

    def halt(self) -> None: ...

    async def aclose(self) -> None: ...


def scrub(text: str) -> str:
    """Replace half characters (lone surrogates), which no file format can hold, by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine: ``localhost`` or an address of the loopback net, not a name like one."""
    return is_loopback_host(urlsplit(url).hostname or "")


def is_loopback_host(host: str) -> bool:
    """The same of a host's name or address alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
