"""`hbll` and `python -m hbll`: the command line, if what it needs is installed."""

import sys

EXTRA = ("tyro", "rich", "matplotlib", "sklearn")
"""What the extra `cli` brings."""


def main() -> None:
    """As `hbll.cli.main`; without the extra one sentence on stderr, and exit code 2."""
    try:
        from hbll import cli

        cli.main()
    except ModuleNotFoundError as missing:
        package = (missing.name or "").split(".")[0]
        if package not in EXTRA:
            raise
        print(f'hbll: the command line needs {package}: pip install "hbll[cli]"', file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
