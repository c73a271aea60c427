#!/usr/bin/env bash
# Makes or reuses .venv, installs the package with what the tests need, and runs all the tests.
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    cat <<'HELP'
Usage: bash launch/test.sh [PYTEST ARGUMENTS]

Makes or reuses .venv, installs distmuon with its test requirements, and runs the tests.

  PYTHON   interpreter that makes .venv (default: python3)
  WORKERS  test processes (default: the number of cores)
HELP
    exit 0
fi

# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup_venv pretrain,accelerate,integrations,dev

# One thread a process: the processes themselves use the cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n "${WORKERS:-auto}" "$@"
