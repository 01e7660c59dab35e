"""The packages that running a model needs, checked before anything slow begins."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

from selfinstruct.errors import MissingPackage

_NEEDED = ("torch", "transformers", "safetensors")


def require_packages() -> None:
    """MissingPackage when one is not installed. Quietens transformers: errors say what matters, bars are ours."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackage(
            f"running a model needs {', '.join(missing)}, which is not installed",
            hint="pip install 'selfinstruct[train]'",
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # peft's use of transformers, which no user of ours can mend.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    from transformers.utils import logging

    quieten: Any = logging.disable_progress_bar
    quieten()
