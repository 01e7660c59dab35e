"""Cross-entropy of the labelled tokens without the full logits.

The logits of 8,192 tokens over 32,000 words are 1 GB in fp32, and their gradient as much again. Here only positions
with a label are multiplied with the head (half of Alpaca's), a chunk at a time, and each chunk's gradient is formed
while its logits are at hand: three matrix products a chunk, and nothing kept but the gradients of hidden states and
head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

CHUNK_ROWS = 4096


def labelled_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    predicting: torch.Tensor,
    targets: torch.Tensor,
    divisor: float,
    *,
    compiled: bool = False,
) -> torch.Tensor:
    """Sum of cross-entropies over the labels, divided by ``divisor`` (labels of the whole step); a scalar in fp32.

    Args:
        hidden: (tokens, width), the last hidden states.
        head: (words, width), the output embedding.
        predicting: int64 (labels,), indices into tokens whose next token counts.
        targets: int64 (labels,), those next tokens.
        compiled: fuse the softmax and its gradient (on a GPU).
    """
    if not torch.is_grad_enabled():
        head = head.detach()  # or its gradient would be formed, and thrown away
    picked = hidden.index_select(0, predicting)
    if picked.shape[0] == 0:
        # Still part of the graph: with sharded weights every process takes part in the backward pass.
        return (hidden[0].float().sum() + head[0].float().sum()) * 0.0
    function: Any = _ChunkedCrossEntropy
    result: torch.Tensor = function.apply(picked, head, targets, divisor, compiled)
    return result


def _softmax_gradient(
    logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of cross-entropies, gradient of ``scale`` times it by the logits) of a chunk (rows, words)."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    total = -log_p.gather(1, targets[:, None]).sum()
    words = torch.arange(logits.shape[1], device=logits.device)
    gradient = (log_p.exp() - (words[None, :] == targets[:, None]).float()) * scale
    return total, gradient.to(logits.dtype)


@functools.cache
def _compiled_softmax_gradient() -> Any:
    """Made when first used: importing the compiler takes seconds."""
    return torch.compile(_softmax_gradient, dynamic=True)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, picked: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, divisor: float, compiled: bool
    ) -> torch.Tensor:
        step = _compiled_softmax_gradient() if compiled else _softmax_gradient
        learns_head, learns_hidden = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
        d_picked = torch.empty_like(picked) if learns_hidden else None
        d_head = torch.zeros_like(head) if learns_head else None
        total = torch.zeros((), dtype=torch.float32, device=picked.device)
        # A tensor, because a compiled function is compiled anew for every new Python number.
        scale = torch.full((), 1.0 / divisor, dtype=torch.float32, device=picked.device)
        for start in range(0, picked.shape[0], CHUNK_ROWS):
            chunk = picked[start : start + CHUNK_ROWS]
            loss, gradient = step(chunk @ head.T, targets[start : start + CHUNK_ROWS], scale)
            total += loss
            if d_picked is not None:
                torch.mm(gradient, head, out=d_picked[start : start + CHUNK_ROWS])
            if d_head is not None:
                d_head.addmm_(gradient.T, chunk)
        ctx.save_for_backward(d_picked, d_head)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[Any, ...]:
        d_picked, d_head = ctx.saved_tensors
        scale = outer[0]
        return (
            None if d_picked is None else d_picked * scale.to(d_picked.dtype),
            None if d_head is None else d_head * scale.to(d_head.dtype),
            None,
            None,
            None,
        )
