"""`python -m hbll`."""

from hbll.cli import main

main()
