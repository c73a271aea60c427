"""The direction of imports, and what importing the package costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

import distmuon

PACKAGE = pathlib.Path(distmuon.__file__).parent
# What a room must not import: see CONTRIBUTING.md
FORBIDDEN = {
    "numerics": (
        "distmuon.plan",
        "distmuon.comm",
        "distmuon.muon",
        "distmuon.pretrain",
        "distmuon.calibrating",
        "distmuon.planning",
        "torch.distributed",
    ),
    "plan": ("distmuon.numerics", "distmuon.comm", "distmuon.muon", "distmuon.pretrain", "torch"),
    "comm": ("distmuon.numerics", "distmuon.muon", "distmuon.pretrain"),
    "calibrating": ("distmuon.plan", "distmuon.muon", "distmuon.pretrain", "distmuon.planning"),
    "diagnosing": (
        "distmuon.plan",
        "distmuon.muon",
        "distmuon.pretrain",
        "distmuon.planning",
        "numpy",
        "rich",
        "transformers",
    ),
    "integrations": (
        "distmuon.calibrating",
        "distmuon.diagnosing",
        "distmuon.planning",
        "distmuon.pretrain",
        "torch.distributed",
    ),
    "qk_clip": (
        "distmuon.pretrain",
        "distmuon.calibrating",
        "distmuon.diagnosing",
        "distmuon.planning",
        "torch.distributed",
    ),
    "planning": ("distmuon.comm", "distmuon.calibrating", "distmuon.diagnosing", "torch.distributed"),
    "": (
        "distmuon.pretrain",
        "distmuon.calibrating",
        "distmuon.diagnosing",
        "distmuon.planning",
        "transformers",
        "datasets",
        "accelerate",
    ),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("room", FORBIDDEN)
def test_direction_of_imports(room):
    files = (PACKAGE / room).rglob("*.py") if room else [p for p in PACKAGE.glob("*.py") if p.name != "cli.py"]
    for path in files:
        for name in imports(path):
            for forbidden in FORBIDDEN[room]:
                assert name != forbidden and not name.startswith(forbidden + "."), f"{path}: {name}"


def test_process_groups_stay_in_their_rooms():
    """The hook of DDP, the checker, the trainer and who measures links make or take groups; the step has ``comm``."""
    allowed = ("comm/", "ddp.py", "checking/", "pretrain/", "calibrating/", "diagnosing/")
    for path in PACKAGE.rglob("*.py"):
        if not str(path.relative_to(PACKAGE)).startswith(allowed):
            assert not any(name.startswith("torch.distributed") for name in imports(path)), path


def test_libraries_of_other_loops_stay_in_their_room():
    """Nothing of the package needs what a user's loop is written in."""
    foreign = ("distmuon.integrations", "accelerate", "lightning", "torchtitan")
    for path in PACKAGE.rglob("*.py"):
        if not str(path.relative_to(PACKAGE)).startswith("integrations/"):
            assert not any(f"{name}.".startswith(f"{library}.") for name in imports(path) for library in foreign), path


def test_core_imports_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import distmuon; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    new = ast.literal_eval(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    foreign = [name for name in new if name not in ("distmuon", "torch") and name not in sys.stdlib_module_names]
    assert foreign == []
