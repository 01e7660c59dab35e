"""Whole batches of prompts through a transformers model: on slots where the model allows it, else left-padded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selfinstruct.errors import EnvironmentFault
from selfinstruct.student.infer.engine import Engine, EngineConfig, columns_for
from selfinstruct.student.infer.left_padded import generate_left_padded
from selfinstruct.student.infer.requests import Answer, Request
from selfinstruct.student.infer.sizing import groups_of_like_size, most_slots, slots_for
from selfinstruct.student.infer.slots import unsupported

_WORTH_COMPILING = 100_000  # new tokens; compiling takes 20 to 60 s, and saves a tenth of the time


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """``limit``: at most so many sequences at a time (None: what the memory holds). ``compile_layers``: None decides
    by the amount of work. ``log`` gets each automatic choice with its reason."""

    limit: int | None = None
    compile_layers: bool | None = None
    log: Callable[[str], None] = lambda _line: None


def generate(
    model: Any, requests: Sequence[Request], end_ids: Collection[int], options: BatchOptions
) -> Iterator[Answer]:
    """Answer all requests, in the order in which they end. The model's weights may be rearranged for good.

    Raises EnvironmentFault when not even one sequence fits the memory.
    """
    reason = unsupported(model.config)
    if reason:
        options.log(f"left-padded batches through generate(): {reason}")
        yield from generate_left_padded(model, requests, end_ids, limit=options.limit)
        return
    plain = on_gpu_unquantised(model)
    work = sum(request.max_new_tokens for request in requests)
    compiled = options.compile_layers
    if compiled is None:
        compiled = plain and work >= _WORTH_COMPILING
    compiled = prepare(model, compile_layers=compiled, log=options.log)
    for group in groups_of_like_size(requests, most_slots(model, limit=options.limit)):
        config = EngineConfig(
            slots=1,
            longest=max(len(request.prompt) + request.max_new_tokens for request in group),
            most_new=max(request.max_new_tokens for request in group),
            graphs=plain,
            compiled=compiled,
        )
        yield from _run_group(model, group, config, end_ids, options)


def on_gpu_unquantised(model: Any) -> bool:
    """Whether CUDA graphs and fused maps go with a model."""
    on_gpu = model.get_input_embeddings().weight.device.type == "cuda"
    return on_gpu and getattr(model, "quantization_method", None) is None


def prepare(model: Any, *, compile_layers: bool, log: Callable[[str], None] = lambda _line: None) -> bool:
    """Rearrange a model once for running on slots; a second call changes nothing. Whether its layers are compiled."""
    from selfinstruct.student.infer.decoder import cannot_compile, compile_once
    from selfinstruct.student.infer.fuse import fuse

    done: frozenset[str] = getattr(model, "_selfinstruct_prepared", frozenset())
    fused = on_gpu_unquantised(model)
    if fused and "fused" not in done:
        fuse(model)
    if compile_layers and "compiled" not in done:
        reason = cannot_compile(model.get_input_embeddings().weight.device)
        if reason:
            log(f"the layers are not compiled: {reason}")
            compile_layers = False
        else:
            compile_once(model)
    wanted = {name for name, on in (("fused", fused), ("compiled", compile_layers)) if on}
    model._selfinstruct_prepared = done | wanted
    return "compiled" in model._selfinstruct_prepared


def _run_group(
    model: Any, group: Sequence[Request], shape: EngineConfig, end_ids: Collection[int], options: BatchOptions
) -> Iterator[Answer]:
    import torch

    slots = slots_for(model, columns_for(shape), len(group), limit=options.limit)
    config = replace(shape, slots=slots)
    options.log(
        f"{len(group)} prompts, {slots} at a time of up to {shape.longest} tokens"
        f"{', CUDA graphs' if config.graphs else ''}{', compiled layers' if config.compiled else ''}"
    )
    engine = Engine(model, config, end_ids)
    try:
        for request in group:
            engine.submit(request)
        gained: dict[int, list[int]] = {request.request_id: [] for request in group}
        told = False
        for news in engine.run():
            if not told and "decode" in engine.choices:
                told = True
                for what, choice in engine.choices.items():
                    options.log(f"{what} attention: {choice}")
            gained[news.request_id] += news.tokens
            if news.ended:
                yield Answer(news.request_id, tuple(gained.pop(news.request_id)), news.ended)
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(
            f"the memory does not suffice ({str(error).split('. ')[0]})",
            hint=f"the same command with --batch {max(1, slots // 2)} goes on with the rows that are left",
        ) from error
    finally:
        engine.close()
