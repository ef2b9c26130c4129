"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_atomically(file: Path, content: bytes | str) -> None:
    """Replaces `file` by one holding `content`: whoever stops in between leaves the old one as it was."""
    content = content.encode() if isinstance(content, str) else content
    unfinished = file.with_name(file.name + ".unfinished")
    with unfinished.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)
