"""A file of settings: the plain part of YAML, ``name: value`` lines and lists, with every bound kept while reading.

Nothing is constructed from tags, no alias is followed, and a value stays the text that was written: the settings' own
types say what is a number. So no YAML type (base 60, octal, dates) can surprise or take time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from selfinstruct.errors import UsageError

MAX_BYTES = 64 * 1024  # all settings written out take less than 2 KiB
MAX_NODES = 1000
MAX_DEPTH = 4
_NULLS = ("", "~", "null", "Null", "NULL")
_HINT = "see: selfinstruct config show"


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values (texts, None, lists) by name, and ``file:line`` by name. UsageError says what is wrong, and where."""
    text = _text_of(path)
    found = _Reader(path, text).settings()
    return {name: value for name, (value, _) in found.items()}, {
        name: f"{path}:{line}" for name, (_, line) in found.items()
    }


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})", hint="check --config FILE") from None
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{path}: larger than {MAX_BYTES // 1024} KiB; this is no config file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text", hint="save it as UTF-8") from None


class _Reader:
    """Walks over the parser's events, which come as the text is read, so that a bound ends the reading."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._line, self._nodes = path, 1, 0
        self._events = self._parsed(text)

    def settings(self) -> dict[str, tuple[Any, int]]:
        """Each setting's value and line, by name; {} for an empty file."""
        self._next(yaml.StreamStartEvent)
        found: dict[str, tuple[Any, int]] = {}
        event = next(self._events)
        if isinstance(event, yaml.DocumentStartEvent):
            top = next(self._events)
            if isinstance(top, yaml.MappingStartEvent):
                found = self._mapping()
            elif not isinstance(top, yaml.ScalarEvent) or self._scalar(top) is not None:
                raise self._wrong("not a list of `name: value` lines", _HINT)
            self._next(yaml.DocumentEndEvent)
            event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise self._wrong("a second document begins (---)", "put all settings into one")
        return found

    def _parsed(self, text: str) -> Iterator[yaml.Event]:
        """The events; any error of the parser, which knows but some of its own, with the line where it stopped."""
        try:
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                self._line = event.start_mark.line + 1 if event.start_mark else self._line
                self._nodes += isinstance(event, yaml.NodeEvent)
                if self._nodes > MAX_NODES:
                    raise self._wrong(f"more than {MAX_NODES} names and values; this is no config file")
                if isinstance(event, yaml.AliasEvent):
                    raise self._wrong("holds a YAML alias (*name)", "write the value out")
                if getattr(event, "tag", None) is not None:
                    raise self._wrong("holds a YAML tag (!name)", "write the value alone; put a text into quotes")
                yield event
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            self._line = mark.line + 1 if mark else self._line
            raise self._wrong(f"not YAML ({getattr(error, 'problem', None) or 'unreadable'})") from None

    def _next(self, kind: type[yaml.Event]) -> None:
        event = next(self._events)
        if not isinstance(event, kind):  # the parser's own grammar: never seen
            raise self._wrong("not YAML")

    def _mapping(self) -> dict[str, tuple[Any, int]]:
        found: dict[str, tuple[Any, int]] = {}
        while not isinstance(key := next(self._events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise self._wrong("a name that is a list", _HINT)
            name, line = str(key.value), self._line
            self._scalar(key)
            if name in found:
                raise self._wrong(f"{name[:60]!r} was set on line {found[name][1]} already", "remove one of the two")
            found[name] = (self._value(next(self._events), depth=1), line)
        return found

    def _value(self, event: yaml.Event, depth: int) -> Any:
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if not isinstance(event, yaml.SequenceStartEvent) or depth >= MAX_DEPTH:
            raise self._wrong("a value that is neither a text, a number nor a list of them", _HINT)
        values = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event, depth + 1))
        return values

    def _scalar(self, event: yaml.ScalarEvent) -> str | None:
        """The text as written; None for a plain nothing. No file can hold half a character, and no path a NUL."""
        text = str(event.value)
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
            raise self._wrong("holds half a character (a lone surrogate) or a NUL", "write the whole character")
        return None if event.implicit[0] and text in _NULLS else text

    def _wrong(self, what: str, hint: str = "") -> UsageError:
        return UsageError(f"{self._path}:{self._line}: {what}", hint=hint)
