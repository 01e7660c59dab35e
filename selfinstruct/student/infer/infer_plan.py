"""What running a model takes: weights, cache, activations; and what that leaves on cards of common sizes.

All sizes in bytes; GB are 10**9 bytes. Compared with measured peaks by ``tests/benchmarks/infer.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from selfinstruct.student.infer import inference_costs as costs
from selfinstruct.student.memory import CARDS, CONTEXT, Shape, weight_bytes

FORMS = ("bf16", "int8", "4bit")


@dataclass(frozen=True, slots=True)
class Plan:
    """Inference in one form. ``slots``: sequences of ``columns`` tokens at a time on ``memory`` bytes, or 0."""

    form: str
    weights: int
    token: int
    workspace: int
    columns: int
    memory: int
    slots: int

    @property
    def cache(self) -> int:
        return self.slots * self.columns * self.token

    @property
    def total(self) -> int:
        """Bytes at the peak with ``slots`` sequences (with one where none fits)."""
        return self.weights + max(1, self.slots) * self.columns * self.token + self.workspace + CONTEXT


def predict(shape: Shape, form: str, *, columns: int, memory: int) -> Plan:
    """How many sequences of ``columns`` tokens (prompt and reply) run at a time on a card of ``memory`` bytes."""
    weights = weight_bytes(shape, form)
    token = costs.cache_bytes(shape.layers, shape.kv_width, 2)
    activation = costs.activation_bytes(shape.width, shape.feed_forward, 2)
    logits = costs.logits_bytes(shape.vocabulary)
    usable = int((memory - CONTEXT) * (1 - costs.SPARE)) - weights
    workspace = activation * max(min(columns, costs.PREFILL_TOKENS["cuda"]), costs.prefill_tokens(usable, activation))
    slots = min(costs.GPU_SLOTS, max(0, (usable - workspace) // (token * columns + logits)))
    return Plan(form, weights, token, workspace + slots * logits, columns, memory, int(slots))


def table(shape: Shape, *, columns: int) -> list[Plan]:
    """Every form on every card, smallest card first."""
    return [predict(shape, form, columns=columns, memory=memory) for memory in CARDS.values() for form in FORMS]


def shown(shape: Shape, plans: list[Plan]) -> list[str]:
    """The table as lines of text."""
    lines = [f"{shape.parameters / 1e9:.2f} billion parameters; cache {plans[0].token / 1e6:.3f} MB a token"]
    sequences = f"sequences of {plans[0].columns} tokens"
    lines.append(f"{'card':>6}  {'form':5} {'weights':>9} {'cache':>9} {'rest':>7}  {sequences}")
    names = {memory: f"{name} GB" for name, memory in CARDS.items()}
    for plan in plans:
        rest = plan.workspace + CONTEXT
        fits = f"{plan.slots} at a time" if plan.slots else "does not fit"
        lines.append(
            f"{names[plan.memory]:>6}  {plan.form:5} {plan.weights / 1e9:6.1f} GB {plan.cache / 1e9:6.1f} GB "
            f"{rest / 1e9:4.1f} GB  {fits}"
        )
    return lines
