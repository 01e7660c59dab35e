"""What a backend is: one method that turns a prompt into a completion, or into one of our errors."""

from __future__ import annotations

import re
from typing import Protocol

from selfinstruct.records import Completion, Prompt

_SURROGATE = re.compile("[\ud800-\udfff]")


class Backend(Protocol):
    """A place where prompts are answered.

    ``complete`` raises only errors of our tree: retryable ones, PromptRefused for this prompt alone, or a
    TeacherFault that ends the run.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_in_flight(self) -> int: ...

    async def complete(self, prompt: Prompt) -> Completion: ...

    async def aclose(self) -> None: ...


def scrub(text: str) -> str:
    """Replace half characters (lone surrogates), which no file format can hold, by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
