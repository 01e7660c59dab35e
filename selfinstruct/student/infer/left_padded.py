"""The plain way: transformers' ``generate`` on left-padded batches of like length, for models that slots do not fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from selfinstruct.errors import EnvironmentFault
from selfinstruct.student.infer import sampling
from selfinstruct.student.infer.requests import Answer, Request

_BATCH = 32


def generate_left_padded(
    model: Any, requests: Sequence[Request], end_ids: Collection[int], *, limit: int | None = None
) -> Iterator[Answer]:
    """Answer all requests, longest first; the batch is halved each time it does not fit the memory.

    A sampled request draws by its own seed: neither the batch nor what was answered before changes its text.
    """
    import torch
    from transformers import GenerationConfig

    # What is asked for here and nothing else: many models bring a repetition penalty or a top_k of their own.
    model.generation_config = GenerationConfig()
    ordered = sorted(requests, key=lambda request: len(request.prompt), reverse=True)
    size, at = limit or _BATCH, 0
    while at < len(ordered):
        batch = ordered[at : at + size]
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


def _generate(model: Any, batch: Sequence[Request], end_ids: Collection[int]) -> list[Answer]:
    import torch

    ends = sorted(end_ids)
    ids, mask = pad_left([request.prompt for request in batch], pad_id=ends[0] if ends else 0)
    most = max(request.max_new_tokens for request in batch)
    draws = any(request.sampling.temperature > 0 for request in batch)
    with torch.inference_mode():
        made = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=most,
            do_sample=False,
            logits_processor=[_Drawn([one.sampling for one in batch], ids.shape[1], most)] if draws else None,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
    answers = []
    for request, row in zip(batch, made[:, ids.shape[1] :].tolist(), strict=True):
        tokens = row[: request.max_new_tokens]
        end = next((place for place, token in enumerate(tokens) if token in end_ids), None)
        answers.append(Answer(request.request_id, tuple(tokens[:end]), "length" if end is None else "stop"))
    return answers


class _Drawn:
    """Leaves ``generate`` no token but the one that each row draws by its own numbers, as the engine does.

    transformers itself draws for all rows of a batch from one generator.
    """

    def __init__(self, how: Sequence[sampling.Sampling], prompt_columns: int, most_new: int) -> None:
        import numpy as np
        import torch

        self._columns = prompt_columns
        self._draws = torch.from_numpy(np.stack([sampling.draws(one.seed, most_new) for one in how]))
        self._ways = [torch.tensor([getattr(one, name) for one in how]) for name in ("temperature", "top_p", "min_p")]

    def __call__(self, ids: Any, scores: Any) -> Any:
        """The scores of the next tokens (rows, vocabulary), with all but the drawn ones at minus infinity."""
        draw = self._draws[:, ids.shape[1] - self._columns]
        temperature, top_p, min_p, draw = (one.to(scores.device, scores.dtype) for one in (*self._ways, draw))
        chosen = sampling.sampled(scores, temperature, top_p, min_p, draw)
        return scores.new_full(scores.shape, -float("inf")).scatter_(1, chosen[:, None], 0.0)


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
