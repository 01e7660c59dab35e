"""Keys where none belongs: in a setting, which is stored, or in a message about one, which is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from selfinstruct.config import RunConfig

_SHORTEST = 8  # characters of a key; shorter ones are placeholders such as EMPTY, and words of every message
_HOLDS_A_KEY = re.compile("KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
_LIKE_A_KEY = re.compile(r"(?<![A-Za-z0-9])(?:sk-[^\s'\",]*+|(?=[A-Za-z]*+[0-9])(?=[0-9]*+[A-Za-z])[A-Za-z0-9]{20,}+)")


@contextmanager
def concealed(environment: Mapping[str, str], variable: object = None) -> Iterator[None]:
    """What looks like a key is blotted out of a UsageError, and what ``variable`` and others named for keys hold."""
    from selfinstruct.errors import UsageError

    try:
        yield
    except UsageError as error:
        values = [value for name, value in environment.items() if name == variable or _HOLDS_A_KEY.search(name)]
        raise UsageError(_blotted(error.message, values), hint=_blotted(error.hint, values)) from None


@contextmanager
def unrepeated(environment: Mapping[str, str]) -> Iterator[None]:
    """The same for what typer says of a command line that it does not understand."""
    import typer

    wrong_usage: Any = typer.BadParameter.__bases__[0]  # typer does not export it, and moved it once
    try:
        yield
    except wrong_usage as error:
        values = [value for name, value in environment.items() if _HOLDS_A_KEY.search(name)]
        error.message = _blotted(error.message, values)
        raise


def refuse(config: RunConfig, environment: Mapping[str, str]) -> None:
    """UsageError, which does not repeat it, when a setting that a run would store holds a key."""
    from selfinstruct.errors import UsageError
    from selfinstruct.quality.credentials import credentials

    key = environment.get(config.api_key_env, "").strip()
    texts = [
        ("teacher", config.teacher),
        ("seeds", config.seeds or ""),
        *(("base_url", url) for url in config.base_url),
    ]
    for name, text in [*texts, *(("decontaminate", file) for file in config.decontaminate)]:
        plain = unquote(text)
        if any(credentials(plain)) or (len(key) >= _SHORTEST and key in plain):
            raise UsageError(
                f"{name} holds a key, and the settings of a run are stored and shown",
                hint="put the key into a variable alone, and name that with --api-key-env NAME [OPENAI_API_KEY]",
            )
    if any(credentials(config.api_key_env)) or _LIKE_A_KEY.search(config.api_key_env):
        raise UsageError(
            "api_key_env looks like a key: it takes the NAME of the variable that holds the key",
            hint="export OPENAI_API_KEY=..., or name another variable with --api-key-env NAME",
        )


def _blotted(text: str, values: Iterable[str]) -> str:
    from selfinstruct.quality.credentials import credentials

    for value in map(str.strip, values):
        if len(value) >= _SHORTEST:
            text = text.replace(value, "***").replace(quote(value, safe=""), "***")
    parts, end = [], 0
    for span in sorted(credentials(text)):
        parts += [text[end : span.start], "***"] if span.start >= end else []
        end = max(end, span.end)
    return _LIKE_A_KEY.sub("***", "".join(parts) + text[end:])
