"""accelerate_on_cpu.py SCRIPT ARGUMENTS: runs a script in which accelerate shards on the CPU, as it does on a GPU."""

import runpy
import sys

from accelerate_cases import cpu_as_accelerator

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with cpu_as_accelerator():
        runpy.run_path(sys.argv[0], run_name="__main__")
