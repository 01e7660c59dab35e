"""CPU time of the novelty index beside what others do, as ratios to the plain rouge_score loop in the same run.

    python tests/benchmarks/novelty.py                          # everything up to 200,000 rows, about 10 minutes
    python tests/benchmarks/novelty.py --parts real latency     # choose parts
    python tests/benchmarks/novelty.py --parts mutated --sizes 1000000 --engines compiled

Needs the 52K Alpaca rows (`--corpus`, jsonl or jsonl.gz with fields `instruction` and `output`); the other corpora are
made from them with fixed seeds. `datasketch` and `rensa` are measured where installed. One thread; CPU seconds.
The loops are extrapolated: seconds a pair on a sample, times the pairs that the loop would have compared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist
from rouge_score import rouge_scorer

from selfinstruct.novelty.compiled import find_core
from selfinstruct.novelty.index import RougeLIndex
from selfinstruct.novelty.rouge import f_measure
from selfinstruct.novelty.tokens import rouge_tokens

ROOT = Path(__file__).resolve().parents[2]
THRESHOLD = 0.7
PARTS = ("real", "latency", "mutated", "adversarial", "long", "profile", "memory", "peers")


# ---- corpora


class Corpora:
    """The 52K, and what seeded mutation makes of it."""

    def __init__(self, path: Path) -> None:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        self.real = [row["instruction"] for row in rows]
        self._tokens = [rouge_tokens(text) for text in self.real]
        self._flat = [token for tokens in self._tokens for token in tokens]
        self._answers = [token for row in rows for token in rouge_tokens(row["output"])]

    def seeds(self) -> list[str]:
        path = ROOT / "seed_tasks" / "en.jsonl"
        if not path.exists():
            return []
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line)["instruction"] for line in lines if line.strip()]

    def mutated(self, count: int) -> list[str]:
        """Copies of random instructions with up to half of their words dropped, replaced or added."""
        rng = random.Random(7)
        texts = []
        for _ in range(count):
            tokens = list(rng.choice(self._tokens))
            for _ in range(rng.randint(1, max(1, len(tokens) // 2))):
                if tokens:
                    self._edit(tokens, rng)
            texts.append(" ".join(tokens))
        return texts

    def _edit(self, tokens: list[str], rng: random.Random) -> None:
        place, kind = rng.randrange(len(tokens)), rng.random()
        if kind < 0.25:
            del tokens[place]
        elif kind < 0.75:
            tokens[place] = rng.choice(self._flat)
        else:
            tokens.insert(place, rng.choice(self._flat))

    def adversarial(self, count: int) -> list[str]:
        """One of 40 common beginnings of up to 8 words, then 2 to 10 random words."""
        rng = random.Random(8)
        heads = [rng.choice(self._tokens)[:8] for _ in range(40)]
        return [" ".join([*rng.choice(heads), *rng.choices(self._flat, k=rng.randint(2, 10))]) for _ in range(count)]

    def long(self, count: int, length: int = 200) -> list[str]:
        """200 consecutive words of the answers; two in five are an earlier text with 5 to 80 words replaced."""
        rng = random.Random(9)
        texts: list[list[str]] = []
        for _ in range(count):
            start = rng.randrange(len(self._answers) - length)
            tokens = self._answers[start : start + length]
            if texts and rng.random() < 0.4:
                tokens = list(rng.choice(texts))
                for _ in range(rng.randint(5, 80)):
                    tokens[rng.randrange(length)] = rng.choice(self._flat)
            texts.append(tokens)
        return [" ".join(tokens) for tokens in texts]


# ---- measuring


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def loop_seconds_a_pair(texts: Sequence[str], seconds: float = 3.0) -> float:
    """CPU seconds that rouge_score takes for two random texts."""
    rng = random.Random(1)
    sample = [rouge_tokens(text) for text in rng.sample(texts, min(len(texts), 4000))]
    pairs = [(rng.choice(sample), rng.choice(sample)) for _ in range(2000)]
    spent, done = 0.0, 0
    while spent < seconds:
        spent += cpu_seconds(lambda: [rouge_scorer._score_lcs(a, b) for a, b in pairs])
        done += len(pairs)
    return spent / done


def rapidfuzz_seconds_a_pair(texts: Sequence[str]) -> float:
    """The same for rapidfuzz without any index: cdist over texts as strings of one code point a token, then F."""
    rng = random.Random(1)
    numbers: dict[str, int] = {}
    sample = rng.sample(texts, min(len(texts), 10_000))
    rows = ["".join(chr(numbers.setdefault(t, len(numbers))) for t in rouge_tokens(text)) for text in sample]
    rows = [row for row in rows if row]
    asked = rows[:100]

    def work() -> None:
        for text in asked:
            for matches, row in zip(cdist([text], rows, scorer=LCSseq.similarity)[0].tolist(), rows, strict=True):
                if matches * 2 > 0.6 * (len(text) + len(row)):
                    f_measure(int(matches), len(text), len(row))

    return cpu_seconds(work) / (len(asked) * len(rows))


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(title: str, *columns: str) -> None:
    print(f"\n### {title}\n")
    row(*columns)
    row(*("---" for _ in columns))


def compare_online(title: str, texts: list[str], first: list[str], engines: list[str], *, brute: bool = True) -> None:
    """Every engine over one corpus, online, after `first`; and the loops over the same pairs."""
    head(title, "method", "CPU s", "us a text", "ratio to the loop", "kept")
    measured, pairs, kept = [], 0, 0
    for engine in engines:
        index = RougeLIndex.from_texts(first, THRESHOLD, engine=engine)
        answers = []
        spent = cpu_seconds(lambda index=index, answers=answers: answers.extend(index.offer_batch(texts)))
        pairs, kept = 0, 0
        for answer in answers:
            pairs += len(first) + kept
            kept += answer.kept
        measured.append((engine, spent, kept))
    loop = pairs * loop_seconds_a_pair(texts)
    row("rouge_score loop (extrapolated)", f"{loop:,.0f}", f"{loop / len(texts) * 1e6:,.0f}", 1, "")
    if brute:
        fuzz = pairs * rapidfuzz_seconds_a_pair(texts)
        row(
            "rapidfuzz, every pair (extrapolated)",
            f"{fuzz:,.0f}",
            f"{fuzz / len(texts) * 1e6:,.0f}",
            f"{loop / fuzz:,.0f}",
            "",
        )
    for engine, spent, kept in measured:
        row(engine, f"{spent:.2f}", f"{spent / len(texts) * 1e6:.1f}", f"{loop / spent:,.0f}", f"{kept:,}")


# ---- parts


def real(corpora: Corpora, options: argparse.Namespace) -> None:
    first = corpora.seeds()
    title = f"{len(corpora.real):,} real instructions, online, {len(first)} seeds first"
    compare_online(title, corpora.real, first, options.engines)


def mutated(corpora: Corpora, options: argparse.Namespace) -> None:
    for size in options.sizes:
        compare_online(f"{size:,} mutated instructions", corpora.mutated(size), [], options.engines)


def adversarial(corpora: Corpora, options: argparse.Namespace) -> None:
    compare_online("52,002 texts with long common beginnings", corpora.adversarial(52_002), [], options.engines)


def long(corpora: Corpora, options: argparse.Namespace) -> None:
    compare_online("20,000 texts of 200 tokens", corpora.long(20_000), [], options.engines, brute=False)


def latency(corpora: Corpora, options: argparse.Namespace) -> None:
    head("One text at a time (CPU us)", "engine", "work", "p50", "p99")
    for engine in options.engines:
        texts = corpora.mutated(55_000)[-3000:]
        index = RougeLIndex.from_texts(corpora.real, THRESHOLD, engine=engine)
        for name, work in (("query at pool 52,002", index.query), ("offer at pool 52,002", index.offer)):
            spent = []
            for text in texts:
                start = time.process_time()
                work(text)
                spent.append((time.process_time() - start) * 1e6)
            row(engine, name, f"{statistics.median(spent):.1f}", f"{statistics.quantiles(spent, n=100)[98]:.1f}")


def profile(corpora: Corpora, options: argparse.Namespace) -> None:
    head("52K online with maximum, top 10 and mean of each text", "method", "CPU s", "us a text", "ratio to the loop")
    count = len(corpora.real)
    loop = count * (count - 1) / 2 * loop_seconds_a_pair(corpora.real)
    row("rouge_score loop (extrapolated)", f"{loop:,.0f}", f"{loop / count * 1e6:,.0f}", 1)
    for engine in options.engines:
        index = RougeLIndex(THRESHOLD, engine=engine)

        def work(index: RougeLIndex = index) -> None:
            for text in corpora.real:
                index.profile(text)
                index.offer(text)

        spent = cpu_seconds(work)
        row(engine, f"{spent:.2f}", f"{spent / count * 1e6:.1f}", f"{loop / spent:,.0f}")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(corpora: Corpora, options: argparse.Namespace) -> None:
    """Each size and engine in a process of its own: growth of its resident memory over the pool's rows."""
    head("Memory, mutated instructions", "engine", "offered", "rows", "B a row")
    for size in options.sizes:
        texts = "\n".join(corpora.mutated(size))
        for engine in options.engines:
            command = [sys.executable, __file__, "--memory-child", engine]
            ended = subprocess.run(command, input=texts, check=True, capture_output=True, text=True)
            rows, used = ended.stdout.split()
            row(engine, f"{size:,}", f"{int(rows):,}", f"{int(used) / int(rows):.0f}")


def memory_child(engine: str) -> None:
    """Reads texts as they come: memory that a corpus left free would hide what the index takes."""
    index = RougeLIndex(THRESHOLD, engine=engine)
    index.offer_batch(["warm up", "the first call"])
    before = resident_bytes()
    while texts := list(islice(sys.stdin, 200)):
        index.offer_batch(texts)
    print(len(index), resident_bytes() - before)


# ---- peers


def exact_pairs(texts: Sequence[str]) -> set[tuple[int, int]]:
    """All pairs (earlier, later) with F above the threshold, by brute force."""
    numbers: dict[str, int] = {}
    rows = ["".join(chr(numbers.setdefault(t, len(numbers))) for t in rouge_tokens(text)) for text in texts]
    found = set()
    for later, text in enumerate(rows):
        common = cdist([text], rows[:later], scorer=LCSseq.similarity)[0].tolist() if later else []
        for earlier, matches in enumerate(common):
            if matches and f_measure(int(matches), len(text), len(rows[earlier])) > THRESHOLD:
                found.add((earlier, later))
    return found


def datasketch_pairs(texts: Sequence[str], jaccard: float) -> Iterator[tuple[int, int]]:
    from datasketch import MinHash, MinHashLSH

    search = MinHashLSH(threshold=jaccard, num_perm=128)
    for later, text in enumerate(texts):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([token.encode() for token in set(rouge_tokens(text))])
        yield from ((earlier, later) for earlier in search.query(sketch))
        search.insert(later, sketch)


def rensa_pairs(texts: Sequence[str], jaccard: float, bands: int) -> Iterator[tuple[int, int]]:
    from rensa import RMinHash, RMinHashLSH

    search, sketches = RMinHashLSH(threshold=jaccard, num_perm=128, num_bands=bands), []
    for later, text in enumerate(texts):
        sketch = RMinHash(num_perm=128, seed=42)
        sketch.update(list(set(rouge_tokens(text))))
        near = search.query(sketch)
        yield from ((earlier, later) for earlier in near if sketch.jaccard(sketches[earlier]) >= jaccard)
        search.insert(later, sketch)
        sketches.append(sketch)


def peers(corpora: Corpora, options: argparse.Namespace) -> None:
    texts = corpora.mutated(10_000)
    exact = exact_pairs(texts)
    head(f"10,000 mutated instructions, {len(exact):,} exact pairs", "method", "CPU s", "recall of pairs", "precision")
    for engine in options.engines:
        spent = cpu_seconds(lambda engine=engine: RougeLIndex(THRESHOLD, engine=engine).offer_batch(texts))
        row(f"{engine} (exact by construction)", f"{spent:.2f}", "1.000", "1.000")
    methods: list[tuple[str, Callable[[], Iterator[tuple[int, int]]]]] = [
        *((f"datasketch, words, J {j}", lambda j=j: datasketch_pairs(texts, j)) for j in (0.54, 0.7, 0.9)),
        ("rensa, words, J 0.7, verified", lambda: rensa_pairs(texts, 0.7, 16)),
        ("rensa, words, J 0.54, verified", lambda: rensa_pairs(texts, 0.54, 32)),
    ]
    for name, pairs in methods:
        found: set[tuple[int, int]] = set()
        try:
            spent = cpu_seconds(lambda pairs=pairs, found=found: found.update(pairs()))
        except ImportError:
            row(name, "not installed", "", "")
            continue
        shared = len(found & exact)
        row(name, f"{spent:.2f}", f"{shared / len(exact):.3f}", f"{shared / max(len(found), 1):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engines = ["numpy", *(["compiled"] if find_core() else [])]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 52_002, 200_000])
    parser.add_argument("--engines", nargs="+", choices=["numpy", "compiled"], default=engines)
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared" / "data" / "alpaca_52k.jsonl.gz")
    parser.add_argument("--memory-child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_child:
        memory_child(options.memory_child)
        return
    corpora = Corpora(options.corpus)
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, one used")
    for part in options.parts:
        globals()[part](corpora, options)


if __name__ == "__main__":
    main()
