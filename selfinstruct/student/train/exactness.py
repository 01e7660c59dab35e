"""Asked of every model before it is trained here: does it compute on joined rows what it computes on separate ones?

The loss is formed from the last hidden states and the head's weight, and rows lie end to end. A model that scales or
caps its logits, whose head has a bias, or whose layers look across the borders of rows (convolutions, states,
attention of their own) would be trained wrongly without a word. Trying it takes two short rows and milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch

from selfinstruct.errors import UsageError
from selfinstruct.student.train import attention, batches
from selfinstruct.student.train.tokens import from_rows
from selfinstruct.student.train.trainee import Trainee

# Of the largest logit: rounding in 32 bits, and in 16 through the depth of a large model.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.1


@torch.no_grad()
def require(trainee: Trainee, kernel: attention.Choice, longest: int) -> None:
    """UsageError unless the joined rows of a loaded model give the logits of separate rows.

    ``longest`` is the longest row of the run. The model computes with ``kernel`` afterwards, and trains.
    """
    model = trainee.model
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = [[(7 * place + 3) % vocabulary for place in range(start, start + 12)] for start in (5, 71)]
    model.eval()
    try:
        trainee.layers()
        joined = _joined(trainee, rows, longest)
        model.set_attn_implementation("sdpa")
        alone = torch.cat([model(torch.tensor([row], device=joined.device)).logits[0].float() for row in rows])
        gap = float((joined - alone).abs().max() / alone.abs().max())
    except torch.cuda.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _refused(model, f"they do not take rows joined end to end ({type(error).__name__}: {error})") from error
    model.set_attn_implementation(kernel.implementation)
    model.train()
    if not gap <= _TOLERANCE.get(model.dtype, _TOLERANCE_16_BITS):
        raise _refused(model, f"joined rows give other logits than separate ones (by {gap:.1%} of the largest)")


def _joined(trainee: Trainee, rows: list[list[int]], longest: int) -> torch.Tensor:
    """The logits that the loss would be formed from, (tokens, words) in fp32."""
    head: Any = trainee.model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise _refused(trainee.model, "their output layer has a bias")
    tokens = from_rows(rows, [1] * len(rows), eos=rows[0][-1], max_length=len(rows[0]))
    batch = batches.join(tokens, range(len(rows)), longest=longest, device=head.weight.device)
    hidden = trainee.hidden_states(batch)[: sum(map(len, rows))]
    return (hidden @ head.weight.T).float()


def _refused(model: Any, why: str) -> UsageError:
    return UsageError(
        f"models of type {model.config.model_type!r} are not supported by fine-tuning: {why}"[:400],
        hint="LLaMA, Mistral, Qwen, SmolLM and alike are; others train with --backend trl",
    )
