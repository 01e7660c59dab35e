"""Tokenizers: `rouge` is rouge_score's own, `unicode` equals it on ASCII and tells the other scripts apart."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import tokenize

from selfinstruct.novelty.tokens import TOKENIZERS, for_language, rouge_tokens, unicode_tokens


def reference(text: str) -> list[str]:
    return tokenize.tokenize(text, None)


@given(st.text(st.characters(codec=None)))
def test_rouge_tokens_equal_rouge_score_on_any_text(text: str) -> None:
    assert rouge_tokens(text) == reference(text)


@given(st.text(st.characters(max_codepoint=127)))
def test_both_tokenizers_agree_on_ascii(text: str) -> None:
    assert unicode_tokens(text) == rouge_tokens(text) == reference(text)


@pytest.mark.slow
def test_rouge_tokens_equal_rouge_score_on_every_code_point() -> None:
    points = [chr(code) for code in range(sys.maxunicode + 1)]
    assert all(rouge_tokens(f"x{c}y") == reference(f"x{c}y") for c in points)


@pytest.mark.parametrize("text", ["a\u212ab", "\u0130", "\ud800x", "a\0b", "", "_a_b-c'd", "\u017f\u0131", "A\u00e9B"])
def test_rouge_tokens_equal_rouge_score_on_traps(text: str) -> None:
    assert rouge_tokens(text) == reference(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Explique a ação, já!", ["explique", "a", "ação", "já"]),
        ("写一首诗", ["写", "一", "首", "诗"]),
        ("用Python写", ["用", "python", "写"]),
        ("Что такое ИИ?", ["что", "такое", "ии"]),
        ("मुझे बताओ", ["मुझे", "बताओ"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("カタカナ、ひら", ["カ", "タ", "カ", "ナ", "ひ", "ら"]),
        ("اكتب قصة", ["اكتب", "قصة"]),
        ("x² + ½", ["x²", "½"]),
        ("😀 — …", []),
        ("snake_case", ["snake", "case"]),
        ("é\ud800ü", ["é", "ü"]),
    ],
)
def test_unicode_tokens_by_script(text: str, tokens: list[str]) -> None:
    assert unicode_tokens(text) == tokens


@given(st.text())
def test_canonically_equal_texts_have_equal_unicode_tokens(text: str) -> None:
    assert unicode_tokens(unicodedata.normalize("NFD", text)) == unicode_tokens(unicodedata.normalize("NFC", text))


@given(st.text())
def test_unicode_tokens_hold_no_separators(text: str) -> None:
    for token in unicode_tokens(text):
        assert token
        assert all(unicodedata.category(c)[0] in "LNM" for c in token)


def test_unicode_tokens_tell_accents_apart() -> None:
    assert unicode_tokens("maçã") != unicode_tokens("mação")
    assert rouge_tokens("maçã")[:1] == rouge_tokens("mação")[:1]


@pytest.mark.parametrize(
    ("language", "name"),
    [("en", "rouge"), ("en-GB", "rouge"), ("EN_us", "rouge"), ("pt", "unicode"), ("enm", "unicode")],
)
def test_language_chooses_the_tokenizer(language: str, name: str) -> None:
    assert for_language(language) == name
    assert name in TOKENIZERS
