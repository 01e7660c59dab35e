"""What running a model takes: weights, cache, activations; and what that leaves on cards of common sizes.

All sizes in bytes; GB are 10**9 bytes. Compared with measured peaks by ``tests/benchmarks/infer.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from selfinstruct.student.memory import CARDS, CONTEXT, Shape

FORMS = ("bf16", "int8", "4bit")
_PREFILL_TOKENS = 16384
_MOST_SLOTS = 1024
_SPARE = 0.06
_INT8 = 1.0 + 4 / 4096  # bytes a parameter of a linear map: 8 bits, a 32-bit scale a row
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, an 8-bit scale each 64, a 32-bit one each 256 scales


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


def weight_bytes(shape: Shape, form: str) -> int:
    """Bytes of the weights: embeddings, head and norms stay in 16 bits in every form."""
    rest = 2 * (shape.parameters - shape.linear_parameters)
    linear = {"bf16": 2.0, "int8": _INT8, "4bit": _NF4}[form]
    return int(rest + linear * shape.linear_parameters)


def predict(shape: Shape, form: str, *, columns: int, memory: int) -> Plan:
    """How many sequences of ``columns`` tokens (prompt and reply) run at a time on a card of ``memory`` bytes.

    The prefill shrinks with the card: a small one reads fewer prompts at a time.
    """
    weights = weight_bytes(shape, form)
    token = 2 * shape.layers * shape.kv_width * 2
    usable = int((memory - CONTEXT) * (1 - _SPARE)) - weights
    prefill = min(_PREFILL_TOKENS, max(columns, usable // 8 // _activation(shape)))
    workspace = prefill * _activation(shape)
    room = usable - workspace
    slots = min(_MOST_SLOTS, max(0, room // (token * columns + 24 * shape.vocabulary)))
    return Plan(form, weights, token, workspace + slots * 24 * shape.vocabulary, columns, memory, int(slots))


def table(shape: Shape, *, columns: int) -> list[Plan]:
    """Every form on every card, smallest card first."""
    return [predict(shape, form, columns=columns, memory=memory) for memory in CARDS.values() for form in FORMS]


def _activation(shape: Shape) -> int:
    """Bytes of activations for a token of a prefill, of one layer, in 16 bits."""
    return 2 * (8 * shape.width + 3 * shape.feed_forward)


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
