"""A tokenizer as GGUF metadata: the pieces, their kinds, merges or scores, and the rule that splits a text first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfinstruct.errors import ModelFileError, UsageError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_QWEN2 = _LLAMA3.replace("\\p{N}{1,3}", "\\p{N}")


@dataclass(frozen=True, slots=True)
class Words:
    """What a GGUF file says about a tokenizer.

    ``kind`` is "gpt2" (byte-level BPE with ``merges``; ``pre`` names the splitting rule) or "llama" (SentencePiece:
    ``scores`` order the merges). ``kinds`` holds one of NORMAL ... BYTE for each of ``pieces``.
    """

    kind: str
    pre: str
    pieces: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    space_prefix: bool


def read_words(folder: Path, rows: int) -> Words:
    """Read ``tokenizer.json`` for an embedding of ``rows`` rows; rows without a piece become unused ones.

    Raises ModelFileError without a readable file, UsageError for a tokenizer that llama.cpp would read otherwise.
    """
    path = folder / "tokenizer.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        model = found["model"]
        vocabulary: dict[str, int] = dict(model["vocab"])
        merges = [_pair(merge) for merge in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{path}: is no BPE tokenizer ({error})"
        raise ModelFileError(said, hint="save the tokenizer as a fast one") from error
    added = {int(token["id"]): token for token in found.get("added_tokens") or ()}
    pieces = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    named = {number: piece for piece, number in vocabulary.items()}
    named |= {number: str(token["content"]) for number, token in added.items()}
    if named and max(named) >= rows:
        raise UsageError(f"the tokenizer has {max(named) + 1} pieces and the model {rows}", hint="resize the embedding")
    spm = bool(model.get("byte_fallback"))
    for number, piece in named.items():
        pieces[number] = piece
        kinds[number] = _kind(piece, added.get(number), str(model.get("unk_token") or ""), spm=spm)
    if not spm:
        pre = _splitting_rule(found.get("pre_tokenizer"))
        return Words("gpt2", pre, tuple(pieces), tuple(kinds), (), tuple(" ".join(m) for m in merges), False)
    scores = _scores(pieces, merges)
    return Words("llama", "default", tuple(pieces), tuple(kinds), scores, (), _prefixes_space(found))


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return str(left), str(right)


def _kind(piece: str, added: Mapping[str, Any] | None, unknown: str, *, spm: bool) -> int:
    if spm and piece == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER
    if spm and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return BYTE
    return NORMAL


def _scores(pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> tuple[float, ...]:
    """SentencePiece joins the pair with the highest score first, BPE the one of lowest rank: score = -rank."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return tuple(-float(ranks[piece]) if piece in ranks else -1e6 for piece in pieces)


def _splitting_rule(rule: Any) -> str:
    """llama.cpp's name for the rule that cuts a text before the merges. A wrong one gives other tokens, silently."""
    parts = rule.get("pretokenizers", [rule]) if isinstance(rule, dict) else []
    shapes = [
        (
            part.get("type"),
            part.get("individual_digits"),
            (part.get("pattern") or {}).get("Regex"),
            part.get("use_regex"),
        )
        for part in parts
    ]
    kinds = [shape[0] for shape in shapes]
    if kinds == ["ByteLevel"] and shapes[0][3] is not False:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and shapes[0][1] and shapes[1][3] is not False:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and shapes[1][3] is False:
        for pattern, name in ((_LLAMA3, "llama-bpe"), (_QWEN2, "qwen2")):
            if shapes[0][2] == pattern:
                return name
    raise UsageError(
        "this tokenizer splits texts by a rule that export does not know",
        hint="convert the folder with llama.cpp's own convert_hf_to_gguf.py",
    )


def _prefixes_space(found: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front: said by the normalizer (Prepend) or the pre-tokenizer (Metaspace)."""
    normalizer = found.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    before = found.get("pre_tokenizer") or {}
    return before.get("type") == "Metaspace" and before.get("prepend_scheme", "always") != "never"
