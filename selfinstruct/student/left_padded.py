"""The plain way: transformers' ``generate`` on left-padded batches of like length, for models that slots do not fit."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from selfinstruct.errors import EnvironmentFault
from selfinstruct.student.requests import Answer, Request

_BATCH = 32


def generate_left_padded(
    model: Any, requests: Sequence[Request], end_ids: Collection[int], *, limit: int | None = None
) -> Iterator[Answer]:
    """Answer all requests, longest first; the batch is halved each time it does not fit the memory.

    Sampled requests draw from torch's global generator, seeded by the first request of each batch.
    """
    import torch
    from transformers import GenerationConfig

    # What is asked for here and nothing else: many models bring a repetition penalty or a top_k of their own.
    model.generation_config = GenerationConfig()
    ordered = sorted(requests, key=lambda r: (_way(r), len(r.prompt)), reverse=True)
    size, at = limit or _BATCH, 0
    while at < len(ordered):
        batch = ordered[at : at + size]
        batch = next(list(same) for _, same in itertools.groupby(batch, _way))
        try:
            yield from _generate(model, batch, end_ids)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise EnvironmentFault(
                    f"a prompt of {len(batch[0].prompt)} tokens does not fit the memory",
                    hint="use --quant 8bit, or fewer new tokens",
                ) from error
            torch.cuda.empty_cache()
            size = len(batch) // 2
            continue
        at += len(batch)


def _way(request: Request) -> tuple[float, float, float]:
    how = request.sampling
    return how.temperature, how.top_p, how.min_p


def _generate(model: Any, batch: Sequence[Request], end_ids: Collection[int]) -> list[Answer]:
    import torch

    ends = sorted(end_ids)
    ids, mask = pad_left([request.prompt for request in batch], pad_id=ends[0] if ends else 0)
    how = batch[0].sampling
    options: dict[str, Any] = {"do_sample": how.temperature > 0}
    if how.temperature > 0:
        torch.manual_seed(how.seed)
        options |= {"temperature": how.temperature, "top_p": how.top_p, "min_p": how.min_p or None, "top_k": 0}
    with torch.inference_mode():
        made = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(request.max_new_tokens for request in batch),
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            **options,
        )
    answers = []
    for request, row in zip(batch, made[:, ids.shape[1] :].tolist(), strict=True):
        tokens = row[: request.max_new_tokens]
        end = next((place for place, token in enumerate(tokens) if token in end_ids), None)
        answers.append(Answer(request.request_id, tuple(tokens[:end]), "length" if end is None else "stop"))
    return answers


def pad_left(prompts: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Any, Any]:
    """(ids, mask), both (rows, longest) int64. Right-padded prompts turn answers to rubbish with a mere warning."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
