"""Made-up tasks for tests: any number, all different, chosen by a hash so that answers depend on prompts alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from teacher import Reply, numbered, prompt_of

_SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo zu bra cle dro fli gra".split()


def task(seed: object) -> dict[str, str]:
    """One task whose words follow from ``seed``; two seeds practically never make similar ones."""
    rng = random.Random(f"task {seed}")

    def words(count: int) -> str:
        return " ".join("".join(rng.choices(_SYLLABLES, k=3)) for _ in range(count))

    given = words(rng.randint(3, 12)) if rng.random() < 0.4 else ""
    output = "\n".join(f"- {words(6)}." for _ in range(rng.randint(1, 3)))
    return {"instruction": f"Explain {words(rng.randint(5, 9))}.", "input": given, "output": output}


def by_prompt(tasks: int = 4, repeat: float = 0.25) -> Callable[[dict[str, Any], int], Reply]:
    """A teacher's answer that depends on the prompt alone; a share of its tasks repeats from prompt to prompt."""

    def answer(body: dict[str, Any], number: int) -> Reply:
        rng = random.Random(hashlib.sha256(prompt_of(body).encode()).hexdigest())
        seeds = [rng.randrange(20) if rng.random() < repeat else f"{rng.random()}" for _ in range(tasks)]
        return Reply(numbered([task(seed) for seed in seeds]), delay=rng.random() * 0.01)

    return answer


def replay(rows: Sequence[dict[str, str]], tasks: int = 16) -> Callable[[dict[str, Any], int], Reply]:
    """A teacher that hands out rows in the order in which requests arrive, ``tasks`` at a time, and then nothing."""

    def answer(body: dict[str, Any], number: int) -> Reply:
        return Reply(numbered(rows[number * tasks : (number + 1) * tasks]) or "done")

    return answer
