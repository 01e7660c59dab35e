"""A conversation in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from selfinstruct.errors import UsageError
from selfinstruct.student.dialogue import encode_dialogue
from selfinstruct.student.infer.engine import Engine, EngineConfig
from selfinstruct.student.infer.generation import on_gpu_unquantised, prepare
from selfinstruct.student.infer.left_padded import generate_left_padded
from selfinstruct.student.infer.reply import Reply
from selfinstruct.student.infer.requests import Request
from selfinstruct.student.infer.sampling import GREEDY, Sampling
from selfinstruct.student.infer.slots import unsupported
from selfinstruct.student.models.weights import Loaded, made_for

_CONTEXT = 4096


class Chat:
    """Remembers what was said; ``say`` streams the reply. Turns that no longer fit are forgotten, oldest first."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 512,
        system: str = "",
        on_forget: Callable[[int], None] = lambda _turns: None,
    ) -> None:
        self._loaded, self._sampling, self._new = loaded, sampling, max_new_tokens
        self._system, self._on_forget = system, on_forget
        self._turns: list[dict[str, str]] = []
        self._context = min(made_for(loaded.model.config), max(_CONTEXT, 2 * max_new_tokens))
        self._engine: Engine | None = None
        if not unsupported(loaded.model.config):
            prepare(loaded.model, compile_layers=False)
            config = EngineConfig(1, self._context, self._new, chunk=2, graphs=on_gpu_unquantised(loaded.model))
            self._engine = Engine(loaded.model, config, loaded.end_ids)
        self._count = 0

    def reset(self) -> None:
        """Forget all that was said."""
        self._turns.clear()

    def say(self, text: str) -> Iterator[str]:
        """The reply to ``text``, piece by piece. A reply that is broken off is remembered as far as it came."""
        turns, ids = self._fitting([*self._turns, {"role": "user", "content": text}])
        if forgotten := (len(self._turns) + 1 - len(turns)) // 2:
            self._on_forget(forgotten)
        self._count += 1
        how = Sampling(
            self._sampling.temperature, self._sampling.top_p, self._sampling.min_p, self._sampling.seed + self._count
        )
        request = Request(self._count, tuple(ids), min(self._new, self._context - len(ids)), how)
        reply = Reply(self._loaded.tokenizer)
        try:
            for tokens in self._tokens(request):
                yield reply.feed(tokens)
            yield reply.end()
        finally:  # question and reply together: Ctrl-C may come at any time, and once more
            self._turns = [*turns, {"role": "assistant", "content": reply.text.strip()}]
            if self._engine is not None and self._engine.busy:
                self._engine.cancel(request.request_id)
                self._engine.step()

    def close(self) -> None:
        """Give the memory back."""
        if self._engine is not None:
            self._engine.close()

    def _tokens(self, request: Request) -> Iterator[tuple[int, ...]]:
        if self._engine is None:
            for answer in generate_left_padded(self._loaded.model, [request], self._loaded.end_ids):
                yield answer.tokens
            return
        self._engine.submit(request)
        for news in self._engine.run():
            yield news.tokens

    def _fitting(self, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """(newest turns, their ids) that leave room for a reply. UsageError when the last turn alone is too long."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        while True:
            ids = encode_dialogue(self._loaded.template, self._loaded.tokenizer, [*system, *turns])
            if len(ids) + min(self._new, self._context // 4) <= self._context:
                return turns, ids
            if len(turns) < 3:
                raise UsageError(f"that is {len(ids)} tokens, too long for {self._context}", hint="say it shorter")
            turns = turns[2:]
