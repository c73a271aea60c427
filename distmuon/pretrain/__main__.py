"""``python -m distmuon.pretrain``."""

import sys

from distmuon.pretrain.command import run_command
from distmuon.pretrain.processes import leave

if __name__ == "__main__":
    sys.exit(leave(run_command(sys.argv[1:], prog="python -m distmuon.pretrain")))
