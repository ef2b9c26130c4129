"""Where data sets lie."""

import os
from pathlib import Path


def data_folder(chosen: Path | None = None) -> Path:
    """The folder holding `mnist/` and the others: `chosen`, else $HBLL_DATA, else ~/.cache/hbll."""
    return chosen or Path(os.environ.get("HBLL_DATA") or "~/.cache/hbll").expanduser()
