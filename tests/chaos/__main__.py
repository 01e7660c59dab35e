"""``python tests/chaos [--short] [--only NAME]``: prints the table of promises; exit code 1 when one broke."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chaos import table

if __name__ == "__main__":
    sys.exit(table.main(sys.argv[1:]))
