"""Tokens as text while they come, and as the entries of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the student room needs torch")
pytest.importorskip("transformers", reason="the student room needs transformers")

from student_tiny import spm_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer

from selfinstruct.student.infer.reply import Reply
from selfinstruct.student.infer.requests import TokenLogprobs
from selfinstruct.student.infer.token_names import TokenNames
from selfinstruct.student.serve.serve_answers import Shape, Whole


def test_a_reply_shows_whole_characters_and_holds_back_what_may_be_a_stop() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("aé💡 STOP b", add_special_tokens=False)["input_ids"]
    reply = Reply(tokenizer, ["STOP", "💡x"])
    pieces = [reply.feed([token]) for token in ids]
    assert "".join(pieces) == "aé💡 "
    assert all("\ufffd" not in piece for piece in pieces)
    assert (reply.stopped, reply.end(), reply.text) == (True, "", "aé💡 ")
    open_end = Reply(tokenizer, ["bcd"])
    assert [open_end.feed([token]) for token in tokenizer("abc", add_special_tokens=False)["input_ids"]] == [
        "a",
        "",
        "",
    ]
    assert (open_end.end(), open_end.text) == ("bc", "abc")


def test_a_completion_keeps_the_space_before_its_first_word(tmp_path: Path) -> None:
    tokenizer = spm_tokenizer(tmp_path)
    prompt, reply = (tokenizer(text)["input_ids"] for text in ("red", "blue"))
    going_on, alone = Reply(tokenizer, before=prompt), Reply(tokenizer)
    assert (going_on.feed(reply[1:]), alone.feed(reply[1:])) == (" blue", "blue")
    assert going_on.tokens_shown == len(reply[1:])
    shape = Shape("student", TokenNames(tokenizer), is_chat=False, top=2)
    entry = TokenLogprobs(-1.0, ((reply[1], -1.0), (prompt[1], -2.0)))
    report = shape.answer([Whole(" blue", "stop", (reply[1],), (0,), (entry,), 1)], 1)["choices"][0]["logprobs"]
    assert report["top_logprobs"] == [{" blue": -1.0, " red": -2.0}]


def test_parts_of_characters_are_told_apart_and_what_is_written_alike_is_told_once(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("é", "💡")]
    assert {tokenizer.decode([part]) for part in parts} == {"\ufffd"}
    names, entry = TokenNames(tokenizer), TokenLogprobs(-0.5, ((parts[0], -0.5), (parts[1], -3.0)))
    whole = Whole("?", "stop", (parts[0],), (0,), (entry,), 1)
    report = Shape("student", names, is_chat=False, top=2).answer([whole], 1)["choices"][0]["logprobs"]
    assert report["top_logprobs"] == [{"bytes:\\xc3": -0.5, "bytes:\\xf0": -3.0}]
    assert report["tokens"] == ["bytes:\\xc3"]
    told = Shape("student", names, is_chat=True, top=2).answer([whole], 1)["choices"][0]["logprobs"]["content"][0]
    assert (told["bytes"], [one["bytes"] for one in told["top_logprobs"]]) == ([0xC3], [[0xC3], [0xF0]])
    words = spm_tokenizer(tmp_path)
    alike = TokenLogprobs(-0.5, ((3 + ord("r"), -0.5), (words.convert_tokens_to_ids("r"), -3.0)))
    whole = Whole("r", "stop", (3 + ord("r"),), (0,), (alike,), 1)
    report = Shape("student", TokenNames(words), is_chat=False, top=2).answer([whole], 1)["choices"][0]["logprobs"]
    assert report["top_logprobs"] == [{"r": -0.5}]


def merged_tokenizer() -> Any:
    """Bytes with merges, among them a space with half of an emoji, as GPT-2's vocabulary has them."""
    from transformers import PreTrainedTokenizerFast

    made = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    for left, right in (("r", "e"), ("re", "d"), ("Ġ", "ð"), ("Ġð", "Ł"), ("Ġ", "red")):
        made["model"]["vocab"][left + right] = len(made["model"]["vocab"])
        made["model"]["merges"].append([left, right])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(made)), eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes", "merges", "sentencepiece"])
def test_the_bytes_of_tokens_make_their_text(kind: str, tmp_path: Path) -> None:
    made = {"bytes": tiny_tokenizer, "merges": merged_tokenizer, "sentencepiece": lambda: spm_tokenizer(tmp_path)}
    tokenizer = made[kind]()
    tokenizer.add_tokens(["[TOOL] é"])
    names = TokenNames(tokenizer)
    for text in ("red blue 💡 é red", "\n[TOOL] éx", " red", "".join(map(chr, range(1, 400)))):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        joined = b"".join(names.raw(token, at_start=place == 0) for place, token in enumerate(ids)).decode()
        assert joined == tokenizer.decode(ids), text
    assert (names.raw(1), names.text(1), names.raw(5000)) == (b"", "<s>", b"")


def starts_of(pieces: list[bytes]) -> list[int]:
    """In which character of the joined text each piece begins."""
    return [len(b"".join(pieces[:place]).decode("utf-8", "ignore")) for place in range(len(pieces))]


@pytest.mark.parametrize("kind", ["bytes", "merges", "sentencepiece"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_tokens_come_with_their_text_for_every_stop_at_every_place(kind: str, chunk: int, tmp_path: Path) -> None:
    made = {"bytes": tiny_tokenizer, "merges": merged_tokenizer, "sentencepiece": lambda: spm_tokenizer(tmp_path)}
    tokenizer = made[kind]()
    ids = tokenizer("red red 💡💡 blue é red", add_special_tokens=False)["input_ids"]
    names = TokenNames(tokenizer)
    pieces = [names.raw(token, at_start=place == 0) for place, token in enumerate(ids)]
    whole, starts = b"".join(pieces).decode(), starts_of(pieces)
    for begin in range(len(whole)):
        for end in range(begin + 1, len(whole) + 1):
            reply = Reply(tokenizer, [whole[begin:end], "never"])
            seen = ""
            for at in range(0, len(ids), chunk):
                seen += reply.feed(ids[at : at + chunk])
                told = reply.tokens_shown
                assert all(start < len(seen) for start in starts[:told])
                assert b"".join(pieces[:told]).decode("utf-8", "ignore").startswith(seen)
            assert (reply.stopped, reply.text) == (True, whole[: whole.find(whole[begin:end])])
            assert reply.tokens_shown == sum(start < len(reply.text) for start in starts)
            assert list(reply.starts[: reply.tokens_shown]) == starts[: reply.tokens_shown]


def test_a_reply_that_ends_by_itself_tells_all_its_tokens() -> None:
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer("ab", add_special_tokens=False)["input_ids"], 2, tokenizer("💡")["input_ids"][1]]
    reply = Reply(tokenizer, ["bc"])
    assert (reply.feed(ids), reply.tokens_shown) == ("a", 1)
    assert (reply.end(), reply.tokens_shown, list(reply.starts)) == ("b\ufffd", 4, [0, 1, 2, 2])
