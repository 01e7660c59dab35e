"""``infer``: answer every row of a file with a model, resumable, on vLLM where it is installed or on transformers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfinstruct.errors import EnvironmentFault, UsageError
from selfinstruct.student.infer import answers, vllm_engine
from selfinstruct.student.infer.generation import BatchOptions, generate
from selfinstruct.student.infer.questions import Question
from selfinstruct.student.infer.requests import Answer, Request
from selfinstruct.student.infer.sampling import Sampling, out_of_range
from selfinstruct.student.models import weights
from selfinstruct.student.models.source import Source, locate
from selfinstruct.student.prompt import Template

ENGINES = ("auto", "vllm", "transformers")
Progress = Callable[[int, int, int], None]
"""Gets (rows done, rows in all, new tokens of this command)."""
_FLUSH_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class InferOptions:
    """How to answer. ``temperature`` 0 is greedy; ``seed`` and the row's number fix a row's draws.

    ``batch``: at most so many rows at a time (None: what the memory holds). ``compile_layers``: None decides by the
    amount of work. ``context``: longest prompt and reply together (None: what the model was made for).
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    template: str | None = None
    engine: str = "auto"
    dtype: str = "auto"
    quant: str | None = None
    batch: int | None = None
    compile_layers: bool | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did. ``too_long`` prompts leave no room for a reply and got an empty one.

    ``peak`` is the highest GPU memory of tensors in bytes, loading included; 0 on a CPU and with vLLM.
    """

    rows: int
    answered: int
    too_long: int
    new_tokens: int
    seconds: float
    peak: int = 0


def infer(
    model: str,
    questions: list[Question],
    out: Path,
    options: InferOptions,
    *,
    log: Callable[[str], None] = lambda _line: None,
    on_progress: Progress = lambda _done, _all, _tokens: None,
) -> Outcome:
    """Answer what ``out`` lacks and put it in order. Raises our errors; what was written by then stays.

    The settings of rows that are there must be the same, up to engine, batch and dtype, which change no meaning.
    """
    _check(options)
    source = locate(model)
    tokenizer = weights.load_tokenizer(source)
    template = weights.template_of(source, tokenizer, options.template)
    settings = _fingerprint(source, template, options)
    begin = time.monotonic()
    with answers.opened(out, settings, questions) as (file, left):
        done, tokens = len(questions) - len(left), 0
        if done:
            log(f"{out}: {done} of {len(questions)} rows are there")
        on_progress(done, len(questions), tokens)
        too_long = peak = 0
        if left:
            runner = _Runner(source, tokenizer, template, options, log)
            requests, refused = runner.requests(left)
            by_row = {question.row: question for question in left}
            for row, length in refused:
                file.add(by_row[row], "", source.name, "too_long", (length, 0))
            too_long = len(refused)
            done += too_long
            flushed = time.monotonic()
            for answer in runner.answers(requests):
                length = len(requests[answer.request_id].prompt)
                text = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
                file.add(by_row[answer.request_id], text, source.name, answer.ended, (length, len(answer.tokens)))
                done, tokens = done + 1, tokens + len(answer.tokens)
                if time.monotonic() - flushed > _FLUSH_SECONDS:
                    file.flush()
                    flushed = time.monotonic()
                    on_progress(done, len(questions), tokens)
            on_progress(done, len(questions), tokens)
            peak = runner.peak()
        file.finish()
    return Outcome(len(questions), len(left), too_long, tokens, time.monotonic() - begin, peak)


class _Runner:
    """A model on one of the engines."""

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        template: Template,
        options: InferOptions,
        log: Callable[[str], None],
    ) -> None:
        self._source, self._tokenizer, self._template = source, tokenizer, template
        self._options, self._log = options, log
        self._on_vllm = _choose_engine(source, options, log)
        self._model: Any = None
        log(f"loading {source.base}")
        if not self._on_vllm:
            self._model = weights.load_weights(source, dtype=options.dtype, quant=options.quant)

    def requests(self, questions: list[Question]) -> tuple[dict[int, Request], list[tuple[int, int]]]:
        """Requests by row, and (row, tokens) of the prompts that leave no room."""
        config = self._model.config if self._model is not None else weights.load_config(self._source)
        context = self._options.context or weights.made_for(config)
        how = self._options
        prompts = self._template.encode_prompts(self._tokenizer, [(one.instruction, one.input) for one in questions])
        made: dict[int, Request] = {}
        refused = []
        for question, ids in zip(questions, prompts, strict=True):
            room = min(how.max_new_tokens, context - len(ids))
            if room < 1:
                refused.append((question.row, len(ids)))
                continue
            sampling = Sampling(how.temperature, how.top_p, how.min_p, how.seed * 1_000_003 + question.row)
            made[question.row] = Request(question.row, tuple(ids), room, sampling)
        return made, refused

    def peak(self) -> int:
        """The highest GPU memory of tensors so far, in bytes."""
        import torch

        on_gpu = self._model is not None and self._model.device.type == "cuda"
        return int(torch.cuda.max_memory_allocated(self._model.device)) if on_gpu else 0

    def answers(self, requests: dict[int, Request]) -> Iterator[Answer]:
        model = self._model
        settings = weights.load_generation_config(self._source) if model is None else model.generation_config
        ends = weights.end_ids(self._template, self._tokenizer, settings)
        if not requests:
            return
        if self._on_vllm:
            longest = max(len(request.prompt) + request.max_new_tokens for request in requests.values())
            engine = vllm_engine.open_engine(
                Path(self._source.base), longest, limit=self._options.batch, dtype=_vllm_dtype(self._options.dtype)
            )
            yield from vllm_engine.generate(engine, list(requests.values()), ends)
            return
        options = BatchOptions(self._options.batch, self._options.compile_layers, self._log)
        yield from generate(self._model, list(requests.values()), ends, options)


def _check(options: InferOptions) -> None:
    bounds = {
        "max-new-tokens": options.max_new_tokens >= 1,
        "batch": options.batch is None or options.batch >= 1,
        "context": options.context is None or options.context >= 2,
    }
    bad = [name for name, good in bounds.items() if not good]
    bad += filter(None, [out_of_range(Sampling(options.temperature, options.top_p, options.min_p))])
    if bad:
        raise UsageError(f"--{bad[0]} is out of range", hint="see selfinstruct infer --help")
    if options.engine not in ENGINES:
        raise UsageError(f"unknown engine {options.engine!r}", hint=f"one of {', '.join(ENGINES)}")


def _choose_engine(source: Source, options: InferOptions, log: Callable[[str], None]) -> bool:
    """True for vLLM; says why."""
    obstacle = ""
    if source.adapter or source.gguf:
        obstacle = "it needs a merged folder (selfinstruct merge)"
    elif options.quant:
        obstacle = "--quant goes with transformers"
    elif not vllm_engine.is_installed():
        obstacle = "it is not installed"
    elif not _has_gpu():
        obstacle = "there is no GPU"
    if options.engine == "vllm" and obstacle:
        raise EnvironmentFault(f"vLLM cannot run this: {obstacle}", hint="--engine transformers")
    if options.engine == "transformers" or obstacle:
        log(f"engine: transformers ({'as asked' if options.engine == 'transformers' else f'not vLLM: {obstacle}'})")
        return False
    log("engine: vLLM")
    return True


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _vllm_dtype(dtype: str) -> str:
    return {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]


def _fingerprint(source: Source, template: Template, options: InferOptions) -> str:
    """What decides the answers' meaning: model files, template, sampling. 16 hex digits."""
    how = asdict(options)
    for name in ("engine", "dtype", "batch", "compile_layers", "template"):
        how.pop(name)
    said = {"model": source.fingerprint(), "template": template.fingerprint(), **how}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
