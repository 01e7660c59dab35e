"""Tokens as text while they come, and as the entries of an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the student room needs torch")
pytest.importorskip("transformers", reason="the student room needs transformers")

from student_tiny import spm_tokenizer, tiny_tokenizer

from selfinstruct.student.reply import Reply
from selfinstruct.student.requests import TokenLogprobs
from selfinstruct.student.serve_answers import Shape, Whole


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
    assert going_on.tokens_in_text == len(reply[1:])
    shape = Shape("student", tokenizer, is_chat=False, top=2)
    entry = TokenLogprobs(-1.0, ((reply[1], -1.0), (prompt[1], -2.0)))
    report = shape.answer([Whole(" blue", "stop", (reply[1],), (entry,), 1)], 1)["choices"][0]["logprobs"]
    assert report["top_logprobs"] == [{" blue": -1.0, " red": -2.0}]


def test_of_tokens_that_are_written_alike_the_likeliest_is_reported() -> None:
    tokenizer = tiny_tokenizer()
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("é", "ü")]
    assert {tokenizer.decode([part]) for part in parts} == {"\ufffd"}
    parts[1] = tokenizer("💡", add_special_tokens=False)["input_ids"][0]
    entry = TokenLogprobs(-0.5, ((parts[0], -0.5), (parts[1], -3.0)))
    shape = Shape("student", tokenizer, is_chat=False, top=2)
    report = shape.answer([Whole("?", "stop", (parts[0],), (entry,), 1)], 1)["choices"][0]["logprobs"]
    assert report["top_logprobs"] == [{"\ufffd": -0.5}]
