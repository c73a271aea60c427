"""``python -m distmuon``: the ``distmuon`` command, as torchrun starts it."""

import sys

from distmuon.cli import main

if __name__ == "__main__":
    sys.exit(main())
