"""Both engines keep exactly what a loop over rouge_score keeps, in any batches, after a resume, for any text."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist
from rouge_score import rouge_scorer

from selfinstruct.novelty import comparisons
from selfinstruct.novelty.compiled import find_core
from selfinstruct.novelty.index import Novelty, Profile, RougeLIndex
from selfinstruct.novelty.rouge import score
from selfinstruct.novelty.tokens import TOKENIZERS

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "alpaca_52k.jsonl.gz"
needs_corpus = pytest.mark.skipif(not CORPUS.exists(), reason="the 52K corpus is not beside the repository")
ENGINES = [
    "numpy",
    pytest.param(
        "compiled",
        marks=pytest.mark.skipif(find_core() is None, reason="the compiled engine is not built (no compiler)"),
    ),
]
every_engine = pytest.mark.parametrize("engine", ENGINES)
THRESHOLDS = st.one_of(st.sampled_from([0.1, 0.5, 0.7, 0.9, 1.0]), st.floats(0.02, 1.0))
WORDS = st.lists(st.sampled_from("a b c d e f g give list three tips".split()), max_size=14).map(" ".join)
MIXED = st.one_of(
    WORDS, st.text(max_size=12), st.sampled_from(["写一首诗", "写一首歌", "a ação", "a acao", "\ud800", "a\0b", ""])
)


class Loop:
    """rouge_score on every pair."""

    def __init__(self, threshold: float, tokenizer: str = "rouge") -> None:
        self.threshold = threshold
        self.tokenize = TOKENIZERS[tokenizer]
        self.rows: list[list[str]] = []

    def scores(self, text: str) -> list[float]:
        tokens = self.tokenize(text)
        return [rouge_scorer._score_lcs(row, tokens).fmeasure for row in self.rows]

    def offer(self, text: str) -> Novelty:
        scores = self.scores(text)
        best = max(scores, default=0.0)
        if best > self.threshold:
            return Novelty(False, best, scores.index(best))
        self.rows.append(self.tokenize(text))
        return Novelty(True, 0.0, None)

    def profile(self, text: str, k: int) -> Profile:
        scores = self.scores(text)
        top = sorted(enumerate(scores), key=lambda entry: (-entry[1], entry[0]))[:k]
        return Profile(max(scores, default=0.0), top, sum(scores) / len(scores) if scores else 0.0)


def mutated(count: int, length: int, words: int, seed: int) -> list[str]:
    """Texts of which many are copies of an earlier one with a few words replaced, dropped, added or swapped."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(words)]
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and rng.random() < 0.6:
            text = list(rng.choice(texts))
            for _ in range(rng.randint(0, len(text) // 3 + 1)):
                place = rng.randrange(len(text) + 1)
                text[place : place + rng.randint(0, 1)] = [rng.choice(vocabulary)] * rng.randint(0, 1)
        else:
            text = [rng.choice(vocabulary) for _ in range(rng.randint(0, length))]
        texts.append(text)
    return [" ".join(text) for text in texts]


@every_engine
@given(texts=st.lists(MIXED, max_size=30), threshold=THRESHOLDS, tokenizer=st.sampled_from(list(TOKENIZERS)))
@settings(deadline=None)
def test_answers_equal_rouge_score(engine: str, texts: list[str], threshold: float, tokenizer: str) -> None:
    loop, one_by_one, batch = Loop(threshold, tokenizer), *(RougeLIndex(threshold, tokenizer, engine) for _ in range(2))
    expected = [loop.offer(text) for text in texts]
    assert [one_by_one.offer(text) for text in texts] == expected
    assert batch.offer_batch(texts) == expected
    assert len(batch) == len(loop.rows)


@every_engine
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(("count", "length", "words"), [(250, 14, 30), (40, 90, 60)])
def test_mutated_texts_equal_rouge_score(engine: str, threshold: float, count: int, length: int, words: int) -> None:
    texts = mutated(count, length, words, seed=count)
    loop, index = Loop(threshold), RougeLIndex(threshold, engine=engine)
    assert index.offer_batch(texts) == [loop.offer(text) for text in texts]


@every_engine
def test_boundary_is_decided_as_rouge_score_does_for_all_lengths_up_to_60(engine: str) -> None:
    for m in range(1, 61):
        for n in range(m, 61):
            if 7 * (m + n) % 20 == 0 and (matches := 7 * (m + n) // 20) <= m:
                shared = [f"t{i}" for i in range(matches)]
                row, text = ([*shared, *(f"{c}{i}" for i in range(k - matches))] for c, k in (("x", m), ("y", n)))
                index = RougeLIndex(0.7, engine=engine)
                index.add(" ".join(row))
                f = rouge_scorer._score_lcs(row, text).fmeasure
                assert index.query(" ".join(text)) == (
                    Novelty(False, f, 0) if f > 0.7 else Novelty(True, 0.0, None)
                )  # fmt: skip


@every_engine
@pytest.mark.parametrize("size", [1, 7, 100])
def test_batch_size_changes_nothing(engine: str, size: int) -> None:
    texts = mutated(1200, 16, 300, seed=3)
    whole = RougeLIndex(engine=engine).offer_batch(texts)
    index = RougeLIndex(engine=engine)
    parts = [
        answer for start in range(0, len(texts), size) for answer in index.offer_batch(texts[start : start + size])
    ]
    assert parts == whole


@every_engine
def test_equal_texts_are_rejected_by_the_first(engine: str) -> None:
    answers = RougeLIndex(engine=engine).offer_batch(["name three colours"] * 600)
    assert answers == [Novelty(True, 0.0, None), *[Novelty(False, 1.0, 0)] * 599]


@every_engine
def test_nearest_is_the_highest_then_the_earliest(engine: str) -> None:
    index = RougeLIndex(0.5, engine=engine)
    for text in ["a b c d", "a b c d e", "x a b c d e", "a b c d e", "a b c d e f"]:
        index.add(text)
    assert index.query("a b c d e") == Novelty(False, 1.0, 1)
    assert index.offer_batch(["q r s t", "a b c d e f g", "a b c d e f"])[1:] == [
        Novelty(False, score("a b c d e f".split(), "a b c d e f g".split()), 4),
        Novelty(False, 1.0, 4),
    ]


@every_engine
def test_resume_changes_nothing(engine: str, tmp_path: Path) -> None:
    texts = [*mutated(900, 40, 200, seed=5), "写一首诗", "a ação", ""]
    whole = RougeLIndex(engine=engine, tokenizer="unicode")
    answers = whole.offer_batch(texts)
    first = RougeLIndex(engine=engine, tokenizer="unicode")
    before = first.offer_batch(texts[:400])
    kept = [text for text, answer in zip(texts[:400], before, strict=True) if answer.kept]
    first.save(tmp_path / "index")
    for resumed in (
        RougeLIndex.from_texts(kept, tokenizer="unicode", engine=engine),
        RougeLIndex.load(tmp_path / "index", engine=engine),
        RougeLIndex.load(tmp_path / "index", engine="numpy"),
    ):
        assert before + resumed.offer_batch(texts[400:]) == answers
        assert (len(resumed), resumed.tokenizer, resumed.threshold) == (len(whole), "unicode", 0.7)


@every_engine
def test_a_damaged_store_is_refused(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "index"
    RougeLIndex.from_texts(["a b", "c d"], engine=engine).save(path)
    path.write_text(path.read_text()[:-2])
    with pytest.raises(ValueError, match="cut off: 1 of 2 rows"):
        RougeLIndex.load(path, engine)
    for content in ("", "{}", "not json\n", "[1]"):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a saved novelty index"):
            RougeLIndex.load(path, engine)


@every_engine
def test_query_adds_nothing_and_add_always_does(engine: str) -> None:
    index = RougeLIndex(engine=engine)
    assert [index.add("a b c"), index.add("a b c"), index.add("")] == [0, 1, 2]
    assert index.query("a b c") == Novelty(False, 1.0, 0)
    assert index.query("new words here").kept
    assert index.query("a b words").kept
    assert len(index) == 3
    assert index.offer("new words here").kept
    assert not index.offer("new words here").kept


@every_engine
@pytest.mark.parametrize("threshold", [0.05, 0.7])
def test_texts_of_any_length_equal_the_score(engine: str, threshold: float) -> None:
    long = " ".join(f"w{i % 37}" for i in range(1500))
    texts = ["w1 w2", long, long + " more", " ".join(long.split()[:1100]), " ".join(long.split()[:700]), "w3 " * 70]
    texts += ["w3 " * 65, "x" * 100_000, "x" * 100_000 + " y", "w1 w2", " ".join(long.split()[5:1023]), "w4 " * 1023]
    loop, index = Loop(threshold), RougeLIndex(threshold, engine=engine)
    loop.scores = lambda text: [score(row, loop.tokenize(text)) for row in loop.rows]  # type: ignore[method-assign]
    assert index.offer_batch(texts) == [loop.offer(text) for text in texts]
    for text in texts:
        best = max(scores := loop.scores(text), default=0.0)
        expected = Novelty(False, best, scores.index(best)) if best > threshold else Novelty(True, 0.0, None)
        assert index.query(text) == expected


@every_engine
@given(texts=st.lists(MIXED, max_size=20), text=MIXED, k=st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_profile_equals_rouge_score(engine: str, texts: list[str], text: str, k: int) -> None:
    loop, index = Loop(0.7), RougeLIndex(engine=engine)
    for row in [*texts, " ".join(["a b c"] * 15)]:
        loop.rows.append(loop.tokenize(row))
        index.add(row)
        index.profile(row)  # its own index grows with the pool
    profile, expected = index.profile(text, k), loop.profile(text, k)
    assert (profile.maximum, profile.top) == (expected.maximum, expected.top)
    assert profile.mean == pytest.approx(expected.mean, abs=1e-12)


@every_engine
def test_profile_of_a_pool_with_common_tokens_equals_rouge_score(engine: str) -> None:
    """Enough rows of each length for several blocks, tokens that become common on the way, and ties across lengths."""
    rng, common = random.Random(4), ["the", "a", "of"]
    loop, index = Loop(0.7), RougeLIndex(engine=engine)
    for number in range(1500):
        row = [rng.choice([*common, f"w{rng.randrange(40)}"]) for _ in range(rng.choice([3, 5, 8, 16, 17, 32, 33]))]
        loop.rows.append(row)
        index.add(" ".join(row))
        if number % 250 == 249:
            for text, k in (("the w1 of a the w2 a a of", 10), ("the", 700), (" ".join(row), 3), ("w3 a", 0), ("x", 2)):
                profile, expected = index.profile(text, k), loop.profile(text, k)
                assert (profile.maximum, profile.top) == (expected.maximum, expected.top)
                assert profile.mean == pytest.approx(expected.mean, abs=1e-12)


@every_engine
def test_profile_of_an_empty_pool_is_zero(engine: str) -> None:
    assert RougeLIndex(engine=engine).profile("a b") == Profile(0.0, [], 0.0)
    with pytest.raises(ValueError, match="k must be 0 or more"):
        RougeLIndex(engine=engine).profile("a", k=-1)


@every_engine
def test_scripts_without_spaces_are_told_apart(engine: str) -> None:
    index = RougeLIndex(tokenizer="unicode", engine=engine)
    texts = [
        "用 Python 写一个排序函数",
        "用 Python 翻译下面的句子",
        "写一首关于春天的诗",
        "写一首关于春天的诗",
        "Что такое ИИ?",
    ]
    assert [answer.kept for answer in index.offer_batch(texts)] == [True, True, True, False, True]
    assert not RougeLIndex.from_texts(texts[:1], engine=engine).query(texts[1]).kept


def test_token_ids_beyond_the_code_points_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = mutated(300, 14, 40, seed=8)
    expected = RougeLIndex(engine="numpy").offer_batch(texts)
    monkeypatch.setattr(comparisons, "_CODE_POINTS", 20)
    assert RougeLIndex(engine="numpy").offer_batch(texts) == expected


@pytest.mark.parametrize("threshold", [0, -0.1, 1.5, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        RougeLIndex(threshold)


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="rouge, unicode"):
        RougeLIndex(tokenizer="words")
    with pytest.raises(ValueError, match="auto, compiled, numpy"):
        RougeLIndex(engine="gpu")


def test_auto_takes_the_compiled_engine_where_it_is_built() -> None:
    assert RougeLIndex().engine == ("numpy" if find_core() is None else "compiled")
    if find_core() is None:
        with pytest.raises(ImportError, match="pip install"):
            RougeLIndex(engine="compiled")


@pytest.mark.slow
@needs_corpus
@pytest.mark.parametrize("engine", ENGINES)
def test_no_two_of_the_52k_instructions_are_too_similar(engine: str) -> None:
    with gzip.open(CORPUS, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["instruction"] for line in lines]
    assert all(answer.kept for answer in RougeLIndex(engine=engine).offer_batch(texts))


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_corpus
def test_real_mutated_and_mixed_rows_equal_brute_force() -> None:
    """rouge_score itself on 1,200 rows; its float rule on rapidfuzz's LCS for 21,000 rows, every pair."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as lines:
        real = [json.loads(line)["instruction"] for line, _ in zip(lines, range(9000), strict=False)]
    rng = random.Random(11)
    texts = (
        real
        + mutated(6000, 20, 2000, seed=2)
        + [" ".join(rng.sample(t.split(), k=len(t.split()))) for t in real[:1500]]
    )
    texts += [t.replace(" the ", " a ").replace("Write", "Compose") for t in real[1500:6000]]
    rng.shuffle(texts)
    assert len(texts) >= 20_000
    loop = Loop(0.7)
    expected = [loop.offer(text) for text in texts[:1200]]
    numbers: dict[str, int] = {}
    rows: list[str] = []
    lengths = np.zeros(len(texts))
    answers = []
    for text in texts:
        row = "".join(chr(numbers.setdefault(token, len(numbers))) for token in TOKENIZERS["rouge"](text))
        best, nearest = 0.0, 0
        if row and rows:
            common = np.maximum(cdist([row], rows, scorer=LCSseq.similarity)[0].astype(np.float64), 1e-9)
            precision, recall = common / len(row), common / np.maximum(lengths[: len(rows)], 1)
            scores = 2 * precision * recall / (precision + recall)
            nearest = int(scores.argmax())
            best = float(scores[nearest])
        answers.append(Novelty(False, best, nearest) if best > 0.7 else Novelty(True, 0.0, None))
        if best <= 0.7:
            lengths[len(rows)] = len(row)
            rows.append(row)
    assert answers[:1200] == expected
    for engine in ("numpy", *(["compiled"] if find_core() else [])):
        assert RougeLIndex(engine=engine).offer_batch(texts) == answers
