"""A tokenizer as GGUF metadata: the pieces, their kinds, merges or scores, and the rule that splits a text first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfinstruct.errors import ModelFileError, UsageError
from selfinstruct.student.prompt import TEMPLATE_FILE, load_template

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_SPACE = "\u2581"  # SentencePiece's sign for it
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_QWEN2 = _LLAMA3.replace("\\p{N}{1,3}", "\\p{N}")


@dataclass(frozen=True, slots=True)
class Words:
    """What a GGUF file says about a tokenizer.

    ``kind`` is "gpt2" (byte-level BPE with ``merges``; ``pre`` names the splitting rule) or "llama" (SentencePiece:
    ``scores`` order the merges). ``kinds`` holds one of NORMAL ... BYTE for each of ``pieces``. ``remark``: what
    llama.cpp reads otherwise, though not in the prompts that the model was trained with.
    """

    kind: str
    pre: str
    pieces: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    space_prefix: bool
    remark: str = ""


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
    _check_merging(model, vocabulary, spm=spm)
    for number, piece in named.items():
        pieces[number] = piece
        kinds[number] = _kind(piece, added.get(number), str(model.get("unk_token") or ""), spm=spm)
    if not spm:
        _check_bytes(found)
        pre = _splitting_rule(found.get("pre_tokenizer"))
        if model.get("ignore_merges") and pre != "llama-bpe":
            raise _refused("takes whole words before it merges (ignore_merges)")
        return Words("gpt2", pre, tuple(pieces), tuple(kinds), (), tuple(" ".join(m) for m in merges), False)
    prefix, remark = _spaces(found, trained=_has_text_template(folder))
    return Words("llama", "default", tuple(pieces), tuple(kinds), _scores(pieces, merges), (), prefix, remark)


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
    raise _refused("splits texts by a rule that export does not know")


def _refused(does: str) -> UsageError:
    return UsageError(
        f"tokenizer.json: this tokenizer {does}, and llama.cpp would read texts otherwise",
        hint="convert the folder with llama.cpp's own convert_hf_to_gguf.py, and compare the tokens",
    )


def _check_merging(model: Mapping[str, Any], vocabulary: Mapping[str, int], *, spm: bool) -> None:
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _refused(f"merges with {name} {model[name]!r}")
    if spm and not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        raise _refused("lacks pieces for some bytes")


def _steps(found: Mapping[str, Any], name: str, inside: str) -> list[Mapping[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, one or several."""
    whole = found.get(name) or {}
    return list(whole.get(inside, [whole] if whole else []))


def _check_bytes(found: Mapping[str, Any]) -> None:
    """llama.cpp reads the bytes of a text as they are."""
    changes = [str(step.get("type")) for step in _steps(found, "normalizer", "normalizers")]
    if changes:
        raise _refused(f"changes texts before it reads them (normalizer {', '.join(changes)})")
    for step in _steps(found, "pre_tokenizer", "pretokenizers"):
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space") is not False:
            raise _refused("puts a space before each text (add_prefix_space)")
        if step.get("type") == "Split" and (step.get("behavior") != "Isolated" or step.get("invert")):
            raise _refused("splits texts by a rule that export does not know")


def _spaces(found: Mapping[str, Any], *, trained: bool) -> tuple[bool, str]:
    """(whether a text gets a space in front, what remains to be said), for what was compared with llama.cpp.

    ``trained``: the model has a text template of ours, whose prompts are read alike in more cases.
    """
    changes, cuts = _steps(found, "normalizer", "normalizers"), _steps(found, "pre_tokenizer", "pretokenizers")
    if not cuts and changes == [_PREPEND, _SPACES]:
        return True, ""
    if not cuts and changes == [_SPACES]:
        return False, ""
    scheme = cuts[0].get("prepend_scheme") if len(cuts) == 1 and cuts[0].get("type") == "Metaspace" else None
    if changes or scheme is None or cuts[0].get("replacement") != _SPACE or cuts[0].get("split") is not False:
        kinds = ", ".join(str(step.get("type")) for step in [*changes, *cuts]) or "neither normalizer nor pre-tokenizer"
        raise _refused(f"marks spaces in a way that was not compared ({kinds})")
    if scheme == "never":
        return False, ""
    # llama.cpp puts a space before each text and after each special token, whatever follows. "always" leaves it out
    # where there is one, "first" after special tokens as well. In our text templates neither makes a difference: no
    # prompt begins with a space, and each turn is tokenised by itself.
    if not trained:
        raise _refused(f"puts a space before some texts only (Metaspace, prepend_scheme {scheme!r})")
    return True, "note: llama.cpp reads a text that begins with a space otherwise; prompts of the template do not"


def _has_text_template(folder: Path) -> bool:
    template = load_template(folder) if (folder / TEMPLATE_FILE).is_file() else None
    if template is None or template.kind != "text":
        return False
    return not any(text[:1].isspace() or text[:1] == "{" for text in (template.with_input, template.without_input))
