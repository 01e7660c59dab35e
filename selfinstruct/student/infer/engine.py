"""Continuous batching on a transformers model: which sequence runs in which slot, and when the next one gets it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfinstruct.errors import EnvironmentFault, UsageError
from selfinstruct.student.infer.decoder import Decoder, Need, Tokens
from selfinstruct.student.infer.inference_costs import PREFILL_TOKENS
from selfinstruct.student.infer.requests import Ended, News, Request, TokenLogprobs
from selfinstruct.student.infer.slots import activation_bytes, logits_bytes

CHUNK = 8  # steps between two looks at the tokens: a look costs a wait for the GPU, a late one wasted steps


@dataclass(slots=True)
class _Running:
    request: Request
    done: int = 0
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of an engine: ``slots`` sequences at a time, ``longest`` tokens of prompt and reply, ``most_new`` of reply.

    ``chunk`` is the number of steps between two looks at the tokens. ``graphs`` (CUDA graphs) needs a GPU;
    ``compiled``: the model's layers are compiled.
    """

    slots: int
    longest: int
    most_new: int
    chunk: int = CHUNK
    graphs: bool = False
    compiled: bool = False


class Engine:
    """Runs requests, many at a time; ``submit`` any number, then ``step`` until ``busy`` is False.

    The first ``len(running)`` slots are always the ones in use, so that a step works on a prefix of the cache, whose
    length is rounded up to few different values (one CUDA graph each).
    """

    def __init__(self, model: Any, config: EngineConfig, end_ids: Collection[int]) -> None:
        self.config = config
        self._end_ids = np.array(sorted(end_ids), dtype=np.int64)
        self._words = int(model.get_input_embeddings().weight.shape[0])
        self._decoder = _build(model, config)
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        self._prefill_tokens = _prefill_tokens(model, config, self._decoder.device)

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self._running or self._waiting)

    @property
    def load(self) -> tuple[int, int]:
        """(running, waiting)."""
        return len(self._running), len(self._waiting)

    def check(self, prompt: Sequence[int]) -> None:
        """UsageError for ids that would be read beyond the embedding: a tokenizer may know more than its model."""
        foreign = next((number for number in prompt if not 0 <= number < self._words), None)
        if foreign is not None:
            raise UsageError(
                f"prompt: the model has no token {str(foreign)[:20]}", hint=f"it has 0 to {self._words - 1}"
            )

    def submit(self, request: Request) -> None:
        """Put a request in line. Raises UsageError when it cannot ever fit."""
        size = len(request.prompt) + request.max_new_tokens
        if not request.prompt:
            raise UsageError("the prompt has no tokens")
        self.check(request.prompt)
        if request.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {request.max_new_tokens}", hint="give a whole number from 1")
        if size > self.config.longest or request.max_new_tokens > self.config.most_new:
            raise UsageError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones do not fit "
                f"{self.config.longest} tokens",
                hint="shorten the prompt or ask for fewer new tokens",
            )
        self._waiting.append(request)

    def cancel(self, request_id: int) -> None:
        """Forget a request; no more news of it. Unknown ones are ignored."""
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)
        for running in self._running:
            if running.request.request_id == request_id:
                running.cancelled = True

    def step(self) -> list[News]:
        """Admit what fits, go a few tokens on with all, and return the news."""
        self._close_ranks([place for place, running in enumerate(self._running) if running.cancelled])
        news: list[News] = []
        if self._worth_admitting():
            while self._waiting and len(self._running) < self.config.slots:
                news += self._admit()
        if self._running:
            news += self._decode()
        return news

    def run(self) -> Iterator[News]:
        """Step until nothing is left."""
        while self.busy:
            yield from self.step()

    def close(self) -> None:
        """Give the memory back."""
        self._decoder.close()

    @property
    def choices(self) -> dict[str, str]:
        """What was chosen at start, with the reasons, for the log."""
        made = {"prefill": self._decoder.prefill_by, "decode": self._decoder.decode_by}
        return {name: f"{choice.name} ({choice.why})" for name, choice in made.items() if choice is not None}

    def _worth_admitting(self) -> bool:
        """A prefill stops all others for a while: wait until a few slots are free, unless few run anyway."""
        free = self.config.slots - len(self._running)
        return bool(self._waiting) and free >= min(len(self._waiting), max(1, self.config.slots // 32))

    def _admit(self) -> list[News]:
        batch: list[Request] = []
        tokens = 0
        while self._waiting and len(self._running) + len(batch) < self.config.slots:
            tokens += len(self._waiting[0].prompt)
            if batch and tokens > self._prefill_tokens:
                break
            batch.append(self._waiting.popleft())
        first = len(self._running)
        slots = range(first, first + len(batch))
        self._running += [_Running(request) for request in batch]
        need = _need(batch)
        made = self._decoder.prefill([r.prompt for r in batch], slots, [r.sampling for r in batch], need)
        return self._report(made, first)

    def _decode(self) -> list[News]:
        rows = _rounded(len(self._running), self.config.slots)
        left = max(running.request.max_new_tokens - running.done for running in self._running)
        longest = max(len(running.request.prompt) + running.done for running in self._running)
        self._decoder.idle(range(len(self._running), rows))
        need = _need([running.request for running in self._running])
        made = self._decoder.decode(rows, longest, min(self.config.chunk, left), need)
        return self._report(made, 0)

    def _report(self, made: Tokens, first: int) -> list[News]:
        """Turn the tokens of the slots from ``first`` on into news, and close ranks where sequences ended."""
        running = self._running[first:]
        ids = made.ids[:, : len(running)]
        ends = np.isin(ids, self._end_ids)
        ended_at = np.where(ends.any(0), ends.argmax(0), ids.shape[0])
        news, over = [], []
        for column, one in enumerate(running):
            room = one.request.max_new_tokens - one.done
            count = min(int(ended_at[column]), room)
            ended: Ended | None = None
            if ended_at[column] < room and ended_at[column] < ids.shape[0]:
                ended = "stop"
            elif count == room:
                ended = "length"
            one.done += count
            details = _details(made, column, count) if one.request.logprobs else ()
            news.append(News(one.request.request_id, tuple(ids[:count, column].tolist()), ended, details))
            if ended:
                over.append(first + column)
        self._close_ranks(over)
        return news

    def _close_ranks(self, over: list[int]) -> None:
        """Give the slots of ended sequences to the last running ones."""
        if not over:
            return
        gone = set(over)
        kept = len(self._running) - len(gone)
        holes = sorted(place for place in gone if place < kept)
        movers = [place for place in range(kept, len(self._running)) if place not in gone]
        longest = max((self._columns(self._running[place]) for place in movers), default=0)
        self._decoder.move(movers, holes, longest)
        for source, target in zip(movers, holes, strict=True):
            self._running[target] = self._running[source]
        del self._running[kept:]

    def _columns(self, running: _Running) -> int:
        return min(len(running.request.prompt) + running.done + self.config.chunk, self._decoder.cache.columns)


def columns_for(config: EngineConfig) -> int:
    """Columns of a slot: a sequence that ends within a chunk goes on to the end of it."""
    return -(-(config.longest + config.chunk) // 16) * 16


def _build(model: Any, config: EngineConfig) -> Decoder:
    import torch

    columns = columns_for(config)
    try:
        return Decoder(
            model,
            slots=config.slots,
            columns=columns,
            most_new=config.most_new,
            graphs=config.graphs,
            compiled=config.compiled,
        )
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(
            f"{config.slots} sequences of {columns} tokens do not fit the memory",
            hint="use --batch with a smaller number, fewer new tokens, or --quant 8bit",
        ) from error


def _prefill_tokens(model: Any, config: EngineConfig, device: Any) -> int:
    """Tokens to read at a time: what fills the device, if the memory beside the cache holds it."""
    import torch

    most = PREFILL_TOKENS.get(device.type, 2048)
    if device.type != "cuda":
        return most
    left = torch.cuda.mem_get_info(device)[0] - config.slots * logits_bytes(model.config)
    return max(1, min(most, left // activation_bytes(model.config, model.get_input_embeddings().weight.element_size())))


def _need(requests: Collection[Request]) -> Need:
    return Need(
        draw=any(request.sampling.temperature > 0 for request in requests),
        logprobs=any(request.logprobs for request in requests),
    )


def _rounded(running: int, slots: int) -> int:
    """Rows of a step: powers of two and one and a half times them, from 32 on in steps of an eighth or less."""
    for size in (1, 2, 4, 8, 12, 16, 24, 32):
        if running <= size:
            return min(size, slots)
    step = max(8, 1 << (running.bit_length() - 4))
    return min(-(-running // step) * step, slots)


def _details(made: Tokens, column: int, count: int) -> tuple[TokenLogprobs, ...]:
    if made.logprobs is None or made.top is None or made.top_ids is None:
        return ()
    return tuple(
        TokenLogprobs(
            float(made.logprobs[step, column]),
            tuple(zip(made.top_ids[step, column].tolist(), made.top[step, column].tolist(), strict=True)),
        )
        for step in range(count)
    )
