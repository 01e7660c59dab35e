"""The file of answers: appended to while they come, one line each, and put in order when all are there.

A command that is killed loses what it had not written, and the next one goes on. Each row names the settings that
made it, so that answers of two kinds never mix. Parquet cannot be appended to: its rows gather in
``OUT.partial.jsonl``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from selfinstruct.durable import replacing, unfinished
from selfinstruct.errors import DamagedFile, IdentityError, OutputError, UsageError
from selfinstruct.student.infer.questions import Question
from selfinstruct.student.lock import held

_COLUMNS = ("row", "instruction", "input", "output", "reference", "generator", "settings", "finish",
            "prompt_tokens", "completion_tokens")  # fmt: skip
_FLUSH_BYTES = 1 << 16
_BEGINS = b'{"row": '


class Answers:
    """Rows of ``out`` (.jsonl or .parquet) made with ``settings`` (a fingerprint); use through ``opened``."""

    def __init__(self, out: Path, settings: str) -> None:
        if out.suffix not in (".jsonl", ".parquet"):
            raise UsageError(f"{out}: unknown kind of file", hint="name a .jsonl or .parquet file with -o")
        self.out, self.settings = out, settings
        self._journal = out if out.suffix == ".jsonl" else out.with_name(f"{out.name}.partial.jsonl")
        self._rows: dict[int, dict[str, Any]] = {}
        self._stream: Any = None

    def load(self, questions: list[Question]) -> list[Question]:
        """Read what is there; the questions that are still open.

        IdentityError when other settings made it, or when answers would be lost: to rows that are not asked for, or
        all of them. A row that changed is answered again.
        """
        if self._journal != self.out and self._journal.is_symlink():
            self._journal.unlink()  # planted: nobody but us makes this file
        found = _read_parquet(self.out) if self.out.suffix == ".parquet" and self.out.exists() else []
        found += list(self._read_journal())
        asked = {question.row: question for question in questions}
        for row in found:
            if row.get("settings") != self.settings:
                raise IdentityError(
                    f"{self.out}: holds answers of another model, template or sampling",
                    hint="name another file with -o, or remove it",
                )
            question = asked.get(row["row"])
            if question and (question.instruction, question.input) == (row.get("instruction"), row.get("input")):
                self._rows[question.row] = {**row, "reference": question.reference}
        foreign = len(found) if not self._rows else sum(row["row"] not in asked for row in found)
        if foreign:
            raise IdentityError(
                f"{self.out}: holds {foreign} answers to rows that the input does not have",
                hint="name another file with -o",
            )
        return [question for question in questions if question.row not in self._rows]

    def add(self, question: Question, output: str, generator: str, finish: str, tokens: tuple[int, int]) -> None:
        """Append an answer; ``tokens`` are those of the prompt and of the answer."""
        row = {
            "row": question.row,
            "instruction": question.instruction,
            "input": question.input,
            "output": output,
            "reference": question.reference,
            "generator": generator,
            "settings": self.settings,
            "finish": finish,
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
        }
        self._rows[question.row] = row
        self._stream.write(_line(row))

    def flush(self) -> None:
        """Let the rows survive this process."""
        self._stream.flush()

    def finish(self) -> None:
        """Put the rows in order, whole or not at all."""
        ordered = [{name: row.get(name) for name in _COLUMNS} for _, row in sorted(self._rows.items())]
        self._stream.close()
        with replacing(self.out, unfinished(self.out)) as stream:
            if self.out.suffix == ".parquet":
                _write_parquet(stream, ordered)
            else:
                stream.writelines(_line(row) for row in ordered)
        if self._journal != self.out:
            self._journal.unlink(missing_ok=True)

    def open(self) -> None:
        """Begin to append, after cutting off a line that a killed process left unfinished."""
        if self._journal.exists():
            content = self._journal.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole != len(content):
                os.truncate(self._journal, whole)
        self._stream = self._journal.open("ab", buffering=_FLUSH_BYTES)

    def close(self) -> None:
        """Write what is left."""
        if self._stream is not None and not self._stream.closed:
            self._stream.close()

    def _read_journal(self) -> Iterator[dict[str, Any]]:
        if not self._journal.exists():
            return
        *lines, unfinished = self._journal.read_bytes().split(b"\n")
        if unfinished[: len(_BEGINS)] != _BEGINS[: len(unfinished)]:  # it is going to be cut off
            raise DamagedFile(f"{self._journal}: ends with what is no answer of ours", hint="name another -o")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                row["row"] = int(row["row"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise DamagedFile(f"{self._journal}:{number}: is no answer of ours", hint="name another -o") from None
            yield row


@contextmanager
def opened(out: Path, settings: str, questions: list[Question]) -> Iterator[tuple[Answers, list[Question]]]:
    """The file, locked and ready to append to, and the questions still open."""
    answers = Answers(out, settings)
    with held(out, out.with_name(f".{out.name}.lock")):
        try:
            left = answers.load(questions)
            answers.open()
            yield answers, left
        except OSError as error:
            said = f"{out}: cannot be written ({error.strerror or error})"
            raise OutputError(said, hint="free some space") from error
        finally:
            answers.close()


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise DamagedFile(f"{path}: cannot be read ({error})", hint="name another file with -o") from error
    if rows and "row" not in rows[0]:
        raise DamagedFile(f"{path}: holds no answers of ours", hint="name another file with -o")
    return rows


def _write_parquet(stream: IO[bytes], rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    kinds = {"row": pa.int64(), "prompt_tokens": pa.int64(), "completion_tokens": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in _COLUMNS])
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), stream, compression="zstd")
