"""Secret-looking and personal text: where it is, what kind it is, and a mask over it.

It is told by its form alone: names, street addresses and what is hidden ("me at site dot com") are not found.
"""

from __future__ import annotations

from operator import attrgetter

from selfinstruct.quality.credentials import credentials
from selfinstruct.quality.personal import personal
from selfinstruct.records import EXAMPLE, Draft, Span

_TURNS = 20  # of masking: where spans overlap, what is left of the second may be one; 400,000 random texts took four


def find(text: str) -> list[Span]:
    """The spans that look secret or personal, in their order; none overlaps another."""
    spans: list[Span] = []
    for span in sorted((*credentials(text), *personal(text)), key=attrgetter("start")):  # stable: the surest first
        if not spans or span.start >= spans[-1].end:
            spans.append(span)
    return spans


def kinds(*texts: str) -> tuple[str, ...]:
    """The kinds of what looks secret or personal in any of the texts, in alphabetic order.

    What is a placeholder by its form or by agreement (user@example.com) is of a kind of its own: ``example_email``.
    """
    return tuple(sorted({span.kind for text in texts for span in find(text)}))


def mask(text: str) -> tuple[str, set[str]]:
    """The text with ``[EMAIL]``, ``[API_KEY]`` ... in the place of each span, and the kinds of what was there.

    Examples are masked like the rest: whoever masks wants nothing that looks so.
    """
    seen: set[str] = set()
    for _ in range(_TURNS):
        spans = find(text)
        if not spans:
            break
        parts, end = [], 0
        for span in spans:
            kind = span.kind.removeprefix(EXAMPLE)
            parts += [text[end : span.start], f"[{kind.upper()}]"]
            end = span.end
            seen.add(kind)
        text = "".join(parts) + text[end:]
    return text, seen


def masked(draft: Draft) -> Draft:
    """The draft with masks over what looks secret or personal; ``repairs`` says ``masked-email`` and the like."""
    fields = {name: mask(getattr(draft, name)) for name in ("instruction", "input", "output")}
    seen = set().union(*(kinds for _, kinds in fields.values()))
    if not seen:
        return draft
    texts = {name: text for name, (text, _) in fields.items()}
    repairs = (*draft.repairs, *(f"masked-{kind}" for kind in sorted(seen)))
    return Draft(draft.request_no, draft.item_no, **texts, repairs=repairs)
