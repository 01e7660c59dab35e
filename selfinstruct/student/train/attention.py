"""Attention over joined rows without a look across their borders: four kernels, the best one there is chosen.

All are registered through transformers' ``AttentionInterface`` and read the borders (``cu_seq_lens_q``, int32,
rows + 1) from the keyword arguments that a model hands down to its layers. transformers builds no mask for an
implementation that it does not know, so nothing of size tokens x tokens exists. Shapes: query (1, heads, tokens, d),
key and value (1, kv heads, tokens, d), result (1, tokens, heads, d).

One 8,192-token step of a 7B, seen on an H200: dense mask 39 % of the matmul rate, varlen 59 %.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfinstruct.errors import UsageError

if TYPE_CHECKING:
    import torch

PREFIX = "selfinstruct_"
KERNELS = ("flash", "varlen", "flex", "sdpa")
_WITHOUT_DROPOUT = ("varlen", "flex")


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that training uses, and why: shown before the start."""

    kernel: str
    reason: str

    @property
    def implementation(self) -> str:
        """The name to load a model with (``attn_implementation``)."""
        return PREFIX + self.kernel

    @property
    def compiles(self) -> bool:
        """Whether a layer with this attention can be compiled whole."""
        return self.kernel in ("varlen", "flash")


def choose(device: torch.device, dtype: torch.dtype, wanted: str = "auto", *, dropout: float = 0.0) -> Choice:
    """The first kernel of the ladder that works here; UsageError when ``wanted`` names one that does not.

    ``dropout`` is the share of attention weights that the model drops in training (``dropout_of``).
    """
    if wanted != "auto":
        if wanted not in KERNELS:
            raise UsageError(f"no attention {wanted!r}", hint=f"known: auto, {', '.join(KERNELS)}")
        obstacle = _obstacle(wanted, device, dtype, dropout)
        if obstacle:
            raise UsageError(f"attention {wanted} cannot be used: {obstacle}", hint="use --attention auto")
        return Choice(wanted, "asked for")
    passed: list[str] = []
    for kernel in KERNELS:
        obstacle = _obstacle(kernel, device, dtype, dropout)
        if not obstacle:
            return Choice(kernel, "; ".join(passed) or "the first choice, and it is here")
        passed.append(f"no {kernel}: {obstacle}")
    raise AssertionError("sdpa works everywhere")


def dropout_of(config: Any) -> float:
    """The share of attention weights that a model drops in training, by its configuration."""
    return float(getattr(config, "attention_dropout", None) or 0.0)


def _obstacle(kernel: str, device: torch.device, dtype: torch.dtype, dropout: float) -> str:
    """Why a kernel cannot be used here, "" if it can."""
    import torch

    if kernel == "sdpa":
        return ""
    if dropout and kernel in _WITHOUT_DROPOUT:
        return f"it has no dropout, and the model's attention_dropout is {dropout:g}"
    if kernel == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    if kernel == "flex":
        return "" if device.type == "cuda" else "it needs a GPU to be compiled for"
    if device.type != "cuda":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {dtype}"
    if kernel == "varlen":
        try:
            _varlen_options()
        except ImportError as error:
            return str(error)
    return ""


def register() -> None:
    """Make the kernels known to transformers; harmless to repeat."""
    from transformers import AttentionInterface

    functions: dict[str, Callable[..., Any]] = {"flash": _flash, "varlen": _varlen, "flex": _flex, "sdpa": _sdpa}
    for kernel, function in functions.items():
        AttentionInterface.register(PREFIX + kernel, function)


def _varlen_options() -> dict[str, Any]:
    """The words for "causal" in this torch's ``varlen_attn``: they moved between versions. ImportError without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise ImportError("this torch has no torch.nn.attention.varlen (2.10 or later has)") from error
    names = inspect.signature(varlen_attn).parameters
    if "window_size" in names:
        return {"window_size": (-1, 0)}
    if "is_causal" in names:
        return {"is_causal": True}
    raise ImportError(f"torch.nn.attention.varlen.varlen_attn takes unknown arguments ({', '.join(names)})")


def _require_plain(kernel: str, kwargs: dict[str, Any]) -> None:
    """Refuse what a kernel would silently ignore."""
    window, longest, dropout = kwargs.get("sliding_window"), kwargs["longest_row"], kwargs.get("dropout")
    if dropout and kernel in _WITHOUT_DROPOUT:
        raise UsageError(
            f"the model drops attention weights in training (by {dropout:g}), and attention {kernel} cannot",
            hint="use --attention sdpa, or set attention_dropout to 0 in the model's config.json",
        )
    if window is not None and window < longest:
        raise UsageError(
            f"the model attends to {window} tokens only, and rows have up to {longest}",
            hint=f"use --max-length {window}",
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UsageError("models with capped attention scores or attention sinks are not supported by fine-tuning")


def _rows(states: torch.Tensor) -> torch.Tensor:
    """(1, heads, tokens, d) as (tokens, heads, d), without a copy where the projection's layout allows it."""
    return states.squeeze(0).transpose(0, 1)


def _varlen(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """torch's own variable-length flash attention (forward and backward in the tree since 2.10)."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    _require_plain("varlen", kwargs)
    q, k, v = _rows(query), _repeated(_rows(key), query), _repeated(_rows(value), query)
    options = dict(VARLEN_OPTIONS or _varlen_options())
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=kwargs.get("scaling"), **options)
    return out.unsqueeze(0), None


# Read once: ``inspect.signature`` inside a compiled layer would break its graph.
try:
    VARLEN_OPTIONS: dict[str, Any] | None = _varlen_options() if importlib.util.find_spec("torch") else None
except ImportError:
    VARLEN_OPTIONS = None


def _repeated(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Key or value heads repeated to the number of query heads: (tokens, heads, d)."""
    times = query.shape[1] // states.shape[1]
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def _flash(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The flash_attn package; it takes fewer key heads than query heads as they are."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    bounds, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    _require_plain("flash", kwargs)
    out: torch.Tensor = flash_attn_varlen_func(
        _rows(query), _rows(key), _rows(value), bounds, bounds, longest, longest,
        dropout_p=kwargs.get("dropout") or 0.0, softmax_scale=kwargs.get("scaling"), causal=True,
    )  # fmt: skip
    return out.unsqueeze(0), None


def _flex(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """FlexAttention with a block mask of the rows."""
    _require_plain("flex", kwargs)
    out = _flex_rows(query, key, value, kwargs["cu_seq_lens_q"], kwargs.get("scaling"))
    return out.transpose(1, 2), None


def _flex_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float | None
) -> torch.Tensor:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = query.shape[2]
    place = torch.arange(tokens, device=query.device)
    row_of = torch.searchsorted(bounds.to(torch.int64), place, right=True)

    def sees(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (row_of[q] == row_of[k])

    mask = create_block_mask(sees, None, None, tokens, tokens, device=str(query.device))
    attend = torch.compile(flex_attention, dynamic=True) if query.is_cuda else flex_attention
    grouped = query.shape[1] != key.shape[1]
    found: Any = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    return found  # type: ignore[no-any-return]


def _sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """One causal ``scaled_dot_product_attention`` a row: no mask, no wasted score, right on every device."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    _require_plain("sdpa", kwargs)
    bounds = kwargs["cu_seq_lens_q"].tolist()
    grouped = query.shape[1] != key.shape[1]
    parts = [
        scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end],
            dropout_p=kwargs.get("dropout") or 0.0, is_causal=True, scale=kwargs.get("scaling"), enable_gqa=grouped,
        )
        for start, end in itertools.pairwise(bounds)
    ]  # fmt: skip
    return torch.cat(parts, dim=2).transpose(1, 2), None
