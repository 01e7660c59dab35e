"""The gate between a draft and the pool: repair, secrets, rules, novelty. One draft at a time: neighbours matter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from selfinstruct.languages import Language
from selfinstruct.novelty.index import RougeLIndex
from selfinstruct.quality import secrets as secrets_of
from selfinstruct.quality.filters import first_failure, repair
from selfinstruct.records import Draft, SeedTask, Verdict, row_id


class Gate:
    """Judges drafts against the seeds and everything accepted before.

    Seeds are never filtered; they are only compared against.
    """

    def __init__(
        self,
        seeds: Sequence[SeedTask],
        *,
        language: Language,
        rules: tuple[str, ...],
        threshold: float,
        tokenizer: str,
        evaluation: Sequence[tuple[str, str]] = (),
        secrets: str = "flag",
    ) -> None:
        """``evaluation`` holds (name, text) of tasks that no draft may resemble: those of evaluation sets.

        Secret-looking or personal text in a draft is replaced when ``secrets`` is "mask", and turns the draft down when
        it is "drop"; with "flag" it stays, and publishing tells of it.
        """
        self._language = language
        self._secrets = secrets
        self._rules = rules
        self._index = RougeLIndex(threshold=threshold, tokenizer=tokenizer)
        self._names: list[str] = []
        self._kept: set[str] = set()
        self._evaluation_names = [name for name, _ in evaluation]
        self._evaluation = RougeLIndex.from_texts((text for _, text in evaluation), threshold, tokenizer)
        for seed in seeds:
            self._index.add(seed.instruction)
            self._names.append(seed.task_id)

    @property
    def engine(self) -> str:
        """Which novelty engine runs."""
        return self._index.engine

    def judge(self, draft: Draft) -> tuple[Draft, Verdict]:
        """The draft as repaired, and whether it enters the pool. An accepted draft counts for all later ones."""
        draft = repair(draft)
        if self._secrets == "mask":
            draft = secrets_of.masked(draft)
        rule, seen = first_failure(draft, self._language, self._rules)
        if rule:
            return draft, Verdict(False, rule, seen[:200])
        if self._secrets == "drop":
            kinds = secrets_of.kinds(draft.instruction, draft.input, draft.output)
            if kinds:
                return draft, Verdict(False, "secret", " ".join(kinds))
        known = self._evaluation.query(draft.instruction)
        if known.nearest_id is not None:
            name = self._evaluation_names[known.nearest_id]
            return draft, Verdict(False, "contaminated", f"ROUGE-L {known.score:.3f}", known.score, name)
        name = row_id(draft.instruction, draft.input)
        if name in self._kept:  # two texts without a single token are never similar, and still the same row
            return draft, Verdict(False, "duplicate", "the same instruction and input", 1.0, name)
        novelty = self._index.offer(draft.instruction)
        if not novelty.kept:
            nearest = None if novelty.nearest_id is None else self._names[novelty.nearest_id]
            return draft, Verdict(False, "not_new", f"ROUGE-L {novelty.score:.3f}", novelty.score, nearest)
        self._names.append(name)
        self._kept.add(name)
        return draft, Verdict(True)

    def restore(self, accepted: Iterable[tuple[str, str]]) -> None:
        """Take up rows (instruction, input) that an earlier session of the run accepted, in their order."""
        for instruction, input in accepted:
            self._index.add(instruction)
            name = row_id(instruction, input)
            self._names.append(name)
            self._kept.add(name)
