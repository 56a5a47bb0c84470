"""Where everything that outlives a run is kept: reference log-probs, the demo's model."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """`$FASTPOST_CACHE`, or `~/.cache/fastpost`; it need not exist yet."""
    root = Path(os.environ.get("FASTPOST_CACHE") or Path.home() / ".cache/fastpost")
    return root.expanduser()
