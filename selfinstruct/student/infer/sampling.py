"""The next token of each row: greedy, or drawn by numbers that belong to the row and not to the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence draws its tokens; temperature 0 is greedy. ``seed`` fixes all draws of the sequence."""

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


GREEDY = Sampling()


def out_of_range(how: Sampling) -> str:
    """The option (``top-p``) that no draw can be made with, "" when all are good. Not a number is none of them."""
    bounds = {
        "temperature": 0 <= how.temperature <= 100,
        "top-p": 0 < how.top_p <= 1,
        "min-p": 0 <= how.min_p <= 1,
    }
    return next((name for name, good in bounds.items() if not good), "")


def draws(seed: int, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1), float32: the draws of a sequence, whatever runs beside it."""
    return np.random.default_rng(seed & (2**64 - 1)).random(count, dtype=np.float32)


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row (rows, vocabulary) -> (rows,) int64; the first among equals."""
    return logits.argmax(-1)


def sampled(logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, draw: Tensor) -> Tensor:
    """A token for each row by inverse transform: its ``draw`` in [0, 1) picks from the sorted, cut distribution.

    logits (rows, vocabulary); the others (rows,) float32. Cut are tokens beyond the smallest set whose probability
    reaches ``top_p``, and those below ``min_p`` times the likeliest. Rows of temperature 0 are greedy.
    """
    # Nearer to 0 the quotients would leave what fp32 holds.
    heat = torch.where(temperature > 0, temperature.clamp_min(1e-5), 1.0)[:, None]
    ranked, order = torch.softmax(logits.float() / heat, -1).sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    kept = (before < top_p[:, None]) & (ranked >= min_p[:, None] * ranked[:, :1])
    kept[:, 0] = True
    reach = (ranked * kept).cumsum(-1)
    at = torch.searchsorted(reach, (draw * reach[:, -1])[:, None], right=True)
    # Rounding can put the draw at the very end: the last kept token is then meant.
    at = torch.minimum(at, kept.sum(-1, keepdim=True) - 1)
    at = torch.where(temperature[:, None] > 0, at, 0)
    drawn = order.gather(-1, at)[:, 0]
    return torch.where(temperature > 0, drawn, greedy(logits))


def logprobs(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The model's own log-probabilities, before temperature and cuts.

    (rows,) of the chosen tokens, (rows, k) of the k likeliest, and their ids; k is TOP_LOGPROBS or the vocabulary.
    """
    table = torch.log_softmax(logits.float(), -1)
    top, ids = table.topk(min(TOP_LOGPROBS, table.shape[-1]), -1)
    return table.gather(-1, chosen[:, None])[:, 0], top, ids
