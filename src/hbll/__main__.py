"""`hbll` and `python -m hbll`: the command line, if what it needs is installed."""

import sys
from typing import NoReturn

EXTRA = ("tyro", "rich", "matplotlib", "sklearn")
"""What the extra `cli` brings."""


def main() -> None:
    """As `hbll.cli.main`; without the extra one sentence on stderr, and exit code 2; 130 after Ctrl-C while it is loaded."""
    try:
        from hbll import cli

        cli.main()
    except ModuleNotFoundError as missing:
        package = (missing.name or "").split(".")[0]
        if package not in EXTRA:
            raise
        _leave(f'the command line needs {package}: pip install "hbll[cli]"', 2)
    except KeyboardInterrupt:
        _leave("interrupted", 130)


def _leave(sentence: str, code: int) -> NoReturn:
    if sys.stderr is not None:  # else it would be printed on stdout
        print(f"hbll: {sentence}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
