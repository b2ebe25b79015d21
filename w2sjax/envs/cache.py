"""Where environments keep files between runs."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "W2SJAX_CACHE"


def default_cache(name: str) -> Path:
    """The folder `name` in $W2SJAX_CACHE, or in the user's cache folder; it need not exist.

    A bucket is no place for small files: the user's folder takes its place.
    """
    chosen = os.environ.get(CACHE_VARIABLE, "")
    if not chosen or "://" in chosen:
        chosen = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/w2sjax"
    return Path(chosen).expanduser() / name
