"""Rows as token ids: tokenised once, prompt and completion apart, kept as flat arrays.

Layout: all ids of all rows in one int32 array; row ``i`` is ``ids[starts[i]:starts[i + 1]]`` and its loss begins at
its token ``loss_from[i]``. 52,002 rows of Alpaca are 26 MB, so nothing is streamed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfinstruct.errors import UsageError
from selfinstruct.student.examples import Example
from selfinstruct.student.prompt import Template


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a split.

    ``ids`` int32 (all tokens), ``starts`` int64 (rows + 1), ``loss_from`` int32 (rows; a row's index of its first
    label, at least 1, because nothing predicts a row's first token). ``truncated`` counts rows cut at the maximal
    length (they end without EOS), ``dropped`` those whose prompt alone fills it, which have nothing to learn.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    loss_from: NDArray[np.int32]
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.starts)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (tokens that the loss counts) of each row."""
        return self.lengths - self.loss_from

    def row(self, index: int) -> NDArray[np.int32]:
        """The ids of one row."""
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def fingerprint(self) -> str:
        """SHA-256 of ids, rows and labels: two runs with the same one see the same tokens."""
        digest = hashlib.sha256()
        for array in (self.ids, self.starts, self.loss_from):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def tokenise(
    examples: Sequence[Example],
    template: Template,
    tokenizer: Any,
    *,
    max_length: int,
    loss_on_prompt: bool = False,
) -> Tokens:
    """Tokenise rows; each is [BOS] prompt completion EOS, cut at ``max_length`` tokens from its end.

    The last label of each row that was not cut is EOS; UsageError if the tokenizer breaks that.
    """
    eos = template.eos_id(tokenizer)
    prompts = template.encode_prompts(tokenizer, [(e.instruction, e.input) for e in examples])
    completions = template.encode_replies(tokenizer, [e.output for e in examples])
    rows: list[list[int]] = []
    firsts: list[int] = []
    truncated = dropped = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        if len(prompt) >= max_length:
            dropped += 1
            continue
        row = [*prompt, *completion, eos]
        truncated += len(row) > max_length
        rows.append(row[:max_length])
        firsts.append(1 if loss_on_prompt else max(1, len(prompt)))
    return from_rows(rows, firsts, eos=eos, max_length=max_length, truncated=truncated, dropped=dropped)


def from_rows(
    rows: Sequence[Sequence[int]],
    loss_from: Sequence[int],
    *,
    eos: int,
    max_length: int,
    truncated: int = 0,
    dropped: int = 0,
) -> Tokens:
    """Pack rows of ids into arrays and check that every row shorter than ``max_length`` ends with EOS."""
    for number, row in enumerate(rows):
        if len(row) < max_length and (not row or row[-1] != eos):
            raise UsageError(
                f"row {number}: its last label is not the end token {eos}, so the student would never learn to stop",
                hint="check the tokenizer's eos_token",
            )
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    ids = np.fromiter((i for row in rows for i in row), np.int32, count=int(starts[-1]))
    return Tokens(ids, starts, np.asarray(loss_from, np.int32).reshape(-1), truncated, dropped)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides the ids: the fast tokenizer's whole serialised state and its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = repr(sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items()))
    return hashlib.sha256((state + special).encode("utf-8", "surrogatepass")).hexdigest()
