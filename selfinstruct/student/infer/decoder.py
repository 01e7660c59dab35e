"""The forward passes over slots: prefill whole prompts, then decode in step, replayed as CUDA graphs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfinstruct.student.infer import attends, sampling
from selfinstruct.student.infer.slots import Pass, SlotCache, attach, passing

_SPAN_STEP = 128
_NOTHING = torch.empty(0)


@dataclass(frozen=True, slots=True)
class Need:
    """What a step must compute besides the likeliest token."""

    draw: bool = False
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens (steps, rows) int64; logprobs (steps, rows), top and top_ids (steps, rows, k) where asked for."""

    ids: np.ndarray
    logprobs: np.ndarray | None = None
    top: np.ndarray | None = None
    top_ids: np.ndarray | None = None


class _Rows:
    """State of each slot on the device: last token, columns in use, how it draws, and how many it has drawn."""

    def __init__(self, slots: int, most_new: int, device: torch.device) -> None:
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(slots, device=device)
        self.top_p = torch.ones(slots, device=device)
        self.min_p = torch.zeros(slots, device=device)
        self.draws = torch.zeros(slots, most_new, device=device)
        self.drawn = torch.zeros(slots, dtype=torch.int64, device=device)

    def all(self) -> tuple[Tensor, ...]:
        return self.tokens, self.lengths, self.temperature, self.top_p, self.min_p, self.draws, self.drawn


class Decoder:
    """A causal model with its attention replaced, ``slots`` sequences wide.

    ``columns`` is the longest sequence (prompt, reply and the overshoot of a chunk). ``graphs`` replays decode steps
    as CUDA graphs; ``compiled`` says that the model's layers are, so that compiled attention may be tried too. The
    model can do nothing else from then on.
    """

    def __init__(self, model: Any, *, slots: int, columns: int, most_new: int, graphs: bool, compiled: bool) -> None:
        self.model, self.graphs = model, graphs
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.cache = SlotCache(model, slots, columns)
        attach(model)
        self._compiled = compiled
        self._rows = _Rows(slots, most_new, self.device)
        self._graphs: dict[tuple[int, int, Need], tuple[Any, tuple[Tensor, ...]]] = {}
        self._pool: Any = None
        query = model.config.num_attention_heads
        keys, _values = self.cache.layers[0]
        self.prefill_by = attends.choose_prefill(self.device, keys.dtype, query, keys.shape[2], keys.shape[3])
        self.decode_by: attends.Choice | None = None

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[int], how: Sequence[sampling.Sampling], need: Need
    ) -> Tokens:
        """Read whole prompts into slots and return the first new token of each, as one step."""
        lengths = [len(prompt) for prompt in prompts]
        at = torch.tensor(list(slots), device=self.device)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        sizes = torch.tensor(lengths, device=self.device)
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=self.device)
        starts[1:] = sizes.cumsum(0)
        columns = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        rows = torch.repeat_interleave(at, sizes, output_size=len(ids))
        step = Pass(rows, columns, self.cache.layers, starts, max(lengths), None, 0, self.prefill_by.attend)
        with passing(step):
            hidden = self._backbone(ids, columns)
        logits = self.model.get_output_embeddings()(hidden[starts[1:].long() - 1])
        self._admit(at, sizes, how)
        chosen, *more = self._choose(logits, at, need)
        self._rows.tokens[at] = chosen
        self._rows.drawn[at] += 1
        return _fetched([(chosen, *more)])

    @torch.inference_mode()
    def decode(self, rows: int, longest: int, steps: int, need: Need) -> Tokens:
        """``steps`` more tokens for each of the first ``rows`` slots; ``longest`` columns are in use at most."""
        self._decide(rows)
        span = min(self.cache.columns, -(-(longest + steps) // _SPAN_STEP) * _SPAN_STEP)
        if self.decode_by is not None and not self.decode_by.span_matters:
            span = self.cache.columns
        history = []
        for _ in range(steps):
            made = self._replay(rows, span, need) if self.graphs else self._step(rows, span, need)
            history.append(tuple(tensor.clone() for tensor in made) if self.graphs else made)
        return _fetched(history)

    def move(self, sources: list[int], targets: list[int], longest: int) -> None:
        """Let the sequences of some slots go on in others."""
        if not sources:
            return
        with torch.inference_mode():
            self.cache.move(sources, targets, longest)
            source, target = (torch.tensor(places, device=self.device) for places in (sources, targets))
            for state in self._rows.all():
                state[target] = state[source]

    def idle(self, slots: Sequence[int]) -> None:
        """Mark slots without a sequence, so that their work stays small and within their columns."""
        if slots:
            with torch.inference_mode():
                at = torch.tensor(list(slots), device=self.device)
                self._rows.lengths[at] = 0
                self._rows.drawn[at] = 0
                self._rows.temperature[at] = 0

    def close(self) -> None:
        """Give cache and graphs back."""
        self._graphs.clear()
        self._pool = None
        self.cache.release()

    def _backbone(self, ids: Tensor, positions: Tensor) -> Tensor:
        decoder = self.model.get_decoder()
        out = decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _admit(self, at: Tensor, lengths: Tensor, how: Sequence[sampling.Sampling]) -> None:
        rows = self._rows
        rows.lengths[at] = lengths
        rows.drawn[at] = 0
        for name in ("temperature", "top_p", "min_p"):
            getattr(rows, name)[at] = torch.tensor([float(getattr(one, name)) for one in how], device=self.device)
        if any(one.temperature > 0 for one in how):
            count = rows.draws.shape[1]
            drawn = np.stack([sampling.draws(one.seed, count) for one in how])
            rows.draws[at] = torch.from_numpy(drawn).to(self.device)

    def _choose(self, logits: Tensor, at: Tensor | slice, need: Need) -> tuple[Tensor, ...]:
        rows = self._rows
        if need.draw:
            last = rows.draws.shape[1] - 1
            draw = rows.draws[at].gather(1, rows.drawn[at].clamp_max(last)[:, None])[:, 0]
            chosen = sampling.sampled(logits, rows.temperature[at], rows.top_p[at], rows.min_p[at], draw)
        else:
            chosen = sampling.greedy(logits)
        return (chosen, *sampling.logprobs(logits, chosen)) if need.logprobs else (chosen,)

    def _step(self, rows: int, span: int, need: Need) -> tuple[Tensor, ...]:
        """One decode step over the first rows; everything it reads and writes stays on the device."""
        state, first = self._rows, slice(0, rows)
        lengths = state.lengths[first]
        used = (lengths + 1).to(torch.int32)
        attend = self.decode_by.attend if self.decode_by else attends.decode_sdpa
        columns, caches = lengths.clone(), self.cache.layers
        step = Pass(torch.arange(rows, device=self.device), columns, caches, _NOTHING, 0, used, span, attend)
        with passing(step):
            hidden = self._backbone(state.tokens[first], columns)
        made = self._choose(self.model.get_output_embeddings()(hidden), first, need)
        state.tokens[first] = made[0]
        state.lengths[first] += 1
        state.drawn[first] += 1
        return made

    def _replay(self, rows: int, span: int, need: Need) -> tuple[Tensor, ...]:
        key = (rows, span, need)
        if key not in self._graphs:
            self._graphs[key] = self._capture(rows, span, need)
        graph, made = self._graphs[key]
        graph.replay()
        return made

    def _capture(self, rows: int, span: int, need: Need) -> tuple[Any, tuple[Tensor, ...]]:
        """Record a step. It is run first, to load and tune kernels, and the state of the rows put back."""
        state = [self._rows.tokens, self._rows.lengths, self._rows.drawn]
        saved = [tensor.clone() for tensor in state]
        make_stream: Any = torch.cuda.Stream
        stream = make_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(rows, span, need)
        torch.cuda.current_stream().wait_stream(stream)
        self._restore(state, saved)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = self._step(rows, span, need)
        self._restore(state, saved)
        return graph, made

    @staticmethod
    def _restore(state: list[Tensor], saved: list[Tensor]) -> None:
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)

    def _decide(self, rows: int) -> None:
        """Choose the decode attention once, on the first real step's shapes."""
        if self.decode_by is None:
            keys, values = self.cache.layers[0]
            query = torch.randn(
                rows, self.model.config.num_attention_heads, keys.shape[3], dtype=keys.dtype, device=self.device
            )
            used = (self._rows.lengths[:rows] + 1).to(torch.int32)
            self.decode_by = attends.choose_decode(query, keys, values, used, may_compile=self._compiled)


def compile_once(model: Any) -> None:
    """Compile the decoder layers in place; one compilation serves all layers and all numbers of tokens."""
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 64)  # it counts the variants of all layers together
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True)


def cannot_compile(device: torch.device) -> str:
    """Why torch.compile does not work here (no compiler, no Python headers), "" when it does; seconds on a GPU."""
    try:
        torch.compile(_probe, dynamic=True)(torch.ones(8, device=device))
    except attends.REFUSALS as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""


def _probe(numbers: Tensor) -> Tensor:
    return numbers.sin() + 1


def _fetched(history: Sequence[tuple[Tensor, ...]]) -> Tokens:
    """Bring the tokens of some steps to the host in one wait."""
    columns = [torch.stack(list(column)).cpu().numpy() for column in zip(*history, strict=True)]
    return Tokens(*columns)
