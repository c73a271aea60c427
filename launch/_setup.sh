# Sourced by the scripts in this folder: makes the virtual environment of the checkout.
# shellcheck shell=bash
#
#   setup_venv EXTRAS   e.g. `setup_venv pretrain,dev`: makes or reuses .venv, installs the package with
#                       these extras into it, activates it and changes to the checkout
#
# PYTHON names the interpreter to make it with (default: python3).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

setup_venv() {
  local extras="$1" python="${PYTHON:-python3}" venv="$ROOT/.venv" stamp wanted have
  if [[ ! -x "$venv/bin/python" ]]; then
    _check_python "$python"
    echo "making $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
      rm -rf "$venv"
      _fail "$python cannot make a virtual environment: install its venv module (on Debian and Ubuntu: apt install python3-venv), or set PYTHON to another interpreter."
    fi
  fi
  _check_python "$venv/bin/python"
  # shellcheck source=/dev/null
  source "$venv/bin/activate"
  # one stamp for each set of extras: what was installed, and from which files
  stamp="$venv/.distmuon-${extras//,/-}"
  wanted="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)"
  have="$(cat "$stamp" 2>/dev/null || true)"
  if [[ "$have" != "$wanted" ]]; then
    echo "installing distmuon[$extras] into $venv (the first time downloads PyTorch)"
    python -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" -e "${ROOT}[$extras]" ||
      _fail "pip could not install distmuon[$extras]: see its message above, check the network, and start again."
    echo "$wanted" >"$stamp"
  fi
  cd "$ROOT" || return
}

_check_python() {
  local version
  version="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" ||
    _fail "$1 does not run: install Python 3.10 or later, or set PYTHON to one."
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    _fail "$1 is Python $version, and 3.10 or later is needed: set PYTHON to one, such as PYTHON=python3.12 (and remove an old .venv)."
}

_fail() {
  echo "error: $*" >&2
  exit 1
}
