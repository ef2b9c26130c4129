"""Where data sets lie."""

import os
from pathlib import Path


def data_folder(chosen: Path | None = None) -> Path:
    """The folder holding `mnist/` and the others: `chosen`, else $HBLL_DATA, else ~/.cache/hbll.

    ValueError when that starts with the home of a user who has none.
    """
    if chosen is not None:
        return chosen
    folder = Path(os.environ.get("HBLL_DATA") or "~/.cache/hbll")
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"the data folder {folder} cannot be found, as the user has no home: name another by --data-dir or HBLL_DATA"
        ) from error
