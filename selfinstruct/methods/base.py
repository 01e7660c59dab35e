"""What a method is: how to ask a teacher for tasks and how to read its replies.

A method is pure: no clock, no I/O, no global randomness. The same pool view and random generator give the same
prompt, on every machine, for ever: resuming a run depends on it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from selfinstruct.records import Completion, Draft, Prompt, Reading, SeedTask


class PoolView(Protocol):
    """The tasks that a prompt may show: all seeds, and the drafts accepted up to a fixed point of the run."""

    @property
    def seeds(self) -> Sequence[SeedTask]: ...

    def __len__(self) -> int:
        """How many accepted drafts there are."""

    def accepted(self, number: int) -> Draft:
        """The accepted draft of that number, from 0."""


class Method(Protocol):
    """One way of generating instruction data.

    ``fingerprint`` changes whenever the same settings would give another prompt or another reading. ``rules`` names
    the quality rules for its drafts, in order. ``tasks_per_request`` is how many tasks one prompt asks for.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def rules(self) -> tuple[str, ...]: ...

    @property
    def tasks_per_request(self) -> int: ...

    def opening(self, request_no: int, pool: PoolView, rng: random.Random) -> Prompt:
        """The prompt of request ``request_no``."""

    def parse(self, prompt: Prompt, completion: Completion) -> Reading:
        """The drafts in a completion of ``prompt``, and a reason for each task that was not whole."""
