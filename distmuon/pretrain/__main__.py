"""``python -m distmuon.pretrain``."""

import logging
import os
import sys

from distmuon.pretrain.command import run_command
from distmuon.pretrain.processes import world_size

if __name__ == "__main__":
    code = run_command(sys.argv[1:], prog="python -m distmuon.pretrain")
    if world_size() == 1:
        sys.exit(code)
    # All is written and the group is left, but its threads live on and may just be letting go of a tensor. One that
    # wants the interpreter's lock for it aborts the process if the interpreter is ending, so it does not end.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
