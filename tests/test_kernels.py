"""Triton kernels: in the interpreter against float64, through the compiler without a GPU, and on one."""

import importlib.machinery
import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch

from distmuon.numerics import kernels
from distmuon.numerics.kernels import external, tiles

HERE = pathlib.Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not kernels.available("cuda"), reason="needs an NVIDIA GPU and triton"
)


def run_python(*arguments, **environment):
    """Runs Python in a process of its own: whether Triton interprets is settled when it is first imported."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env | environment)


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    run = run_python("-m", "pytest", "-q", "-p", "no:xdist", str(HERE / "kernel_checks.py"), TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from distmuon.numerics.kernels import symmetric, tiles

def shared_bytes(tile, dtype, capability, ones=(), multiples_of_16=True, **flags):
    flags = dict(side=tile.side, piece=tile.piece, panel=tile.panel, interpreted=False, **flags)
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(symmetric._upper_product.arg_names):
        if name in flags or name in ones:
            signature[name], constants[(position,)] = "constexpr", flags.get(name, 1)
        elif name in ("alpha", "beta"):
            signature[name] = "fp32"
        else:
            signature[name] = "*" + dtype if name in ("a", "b", "c", "out") else "i32"
            if multiples_of_16 and not name.startswith("tiles"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(symmetric._upper_product, signature, constants, attributes)
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared

rows = ("a_inner", "b_inner", "c_column", "out_column")
columns = ("a_row", "b_row", "c_column", "out_column")
product, gram = dict(has_addend=True, whole_pieces=True), dict(has_addend=False, whole_pieces=False)
print(shared_bytes(tiles._FLOAT32, "fp32", 80, rows, **product))
print(shared_bytes(tiles._LARGE, "bf16", 90, rows, **product))
print(shared_bytes(tiles._LARGE, "fp16", 90, columns, **gram))
print(shared_bytes(tiles._LARGE, "bf16", 120, rows, **product))
# sizes of 1 are constants to the compiler
print(shared_bytes(tiles._SMALL, "bf16", 90, ("size", "inner", *rows, *columns), multiples_of_16=False, **gram))
"""


@needs_triton
@pytest.mark.slow
def test_compiles_for_gpus_and_fits_the_smallest(tmp_path):
    """The interpreter accepts more than the compiler does, and the compiler needs no GPU."""
    run = run_python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr
    shared = [int(line) for line in run.stdout.split()]
    assert len(shared) == 5
    # capability 8.6, 8.9 and 12.0 give a program 99 KiB
    assert max(shared) <= 99 * 1024


WITHOUT_TRITON = """
import sys
import torch
from distmuon.numerics import kernels
assert "triton" not in sys.modules
sys.modules["triton"] = None
assert not kernels.available("cpu")
try:
    from distmuon.numerics.kernels import symmetric
except ImportError as error:
    assert "needs the package triton" in str(error), error
else:
    raise AssertionError("symmetric was imported")
"""


def test_without_triton():
    run = run_python("-c", WITHOUT_TRITON, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr


ON_CPU = """
import torch
from distmuon.numerics import kernels
assert not kernels.available("cpu")
from distmuon.numerics.kernels import symmetric
try:
    symmetric.gram(torch.ones(4, 4))
except ValueError as error:
    assert "x is on cpu" in str(error), error
else:
    raise AssertionError("a kernel ran on a CPU tensor")
"""


@needs_triton
def test_cpu_tensors_without_the_interpreter():
    run = run_python("-c", ON_CPU)
    assert run.returncode == 0, run.stderr


def test_tiles():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for size in (1, 64, 256, 257, 4096):
            tile = tiles.choose(size, dtype)
            side = -(-size // tile.side)
            assert tiles.upper_tiles(size, tile) == sum(1 for i in range(side) for j in range(side) if i <= j)
            assert tile.side <= 128, "offsets in a tile of 32 bits allow strides of 2^24"
            # of a large tile, a small result would fill little
            assert tile.side == 64 or size > 256


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype):
    from distmuon.numerics.kernels import symmetric

    x = torch.randn(2, 1000, 3000, device="cuda", dtype=dtype)
    x = x / torch.linalg.matrix_norm(x.float(), keepdim=True).to(dtype)
    unit = torch.finfo(dtype).eps
    for matrices in (x, x[0], x[:, ::2, 1:1502:3], x[:, :, :1000].mT):
        r = symmetric.gram(matrices)
        exact = matrices.double() @ matrices.double().mT
        assert torch.equal(r, r.mT)
        assert (r.double() - exact).norm() <= unit * exact.norm()
        q = symmetric.quadratic(r, -4.775, 2.0315)
        exact_q = -4.775 * r.double() + 2.0315 * r.double() @ r.double()
        assert torch.equal(q, q.mT)
        assert (q.double() - exact_q).norm() <= unit * exact_q.norm()
        product = symmetric.symmetric_product(r, q, 3.0, r, 1.5)
        exact_product = 3.0 * r.double() + 1.5 * r.double() @ q.double()
        assert torch.equal(product, product.mT)
        # the upper half of R Q differs from its lower half by the rounding of Q
        assert (product.double() - exact_product).norm() <= 2 * unit * exact_product.norm()


@needs_gpu
def test_compiled_on_a_gpu():
    from distmuon.numerics.kernels import symmetric

    def stage(x):
        r = symmetric.gram(x)
        return symmetric.quadratic(r, -4.775, 2.0315, out=torch.empty_like(r))

    x = torch.randn(3, 300, 500, device="cuda", dtype=torch.bfloat16) / 400
    assert torch.equal(torch.compile(stage, fullgraph=True)(x), stage(x))


class StandIn:
    """`GramNewtonSchulz` as version 0.1.6 declares it; it answers with what it was given."""

    def __init__(
        self,
        ns_epsilon=1e-7,
        ns_use_kernels=True,
        ns_coefficients=None,
        use_gram_newton_schulz=True,
        gram_newton_schulz_reset_iterations=None,
        compile_kwargs=None,
    ):
        self.options = locals()

    def __call__(self, x):
        assert x.ndim == 3
        stages = self.options["ns_coefficients"] or [[0.0, 0.0, 0.0]]
        # as versions before 0.1.6 do
        x /= 2.0
        return x * sum(map(sum, stages)) + self.options["gram_newton_schulz_reset_iterations"][0]


@pytest.fixture
def stand_in(monkeypatch):
    external._engine.cache_clear()
    for name in ("gram_newton_schulz", "quack"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.GramNewtonSchulz = StandIn
        monkeypatch.setitem(sys.modules, name, module)
    yield
    external._engine.cache_clear()


def test_external_engine(stand_in):
    assert external.installed()
    for shape in ((4, 6), (3, 4, 6), (2, 3, 4, 6)):
        x = torch.randn(shape)
        before = x.clone()
        y = external.gram_newton_schulz(x, [(1, 2, 3), (4, 5, 6)], restarts=(7,))
        torch.testing.assert_close(y, before / 2 * 21 + 7)
        assert torch.equal(x, before)
    assert external.gram_newton_schulz(torch.empty(0, 4, 6)).shape == (0, 4, 6)
    with pytest.raises(ValueError, match="three numbers a stage"):
        external.gram_newton_schulz(x, [(1.0, 2.0)])
    with pytest.raises(ValueError, match=r"x has shape \(3,\)"):
        external.gram_newton_schulz(torch.ones(3))


def test_external_engine_is_named_when_missing(monkeypatch):
    external._engine.cache_clear()
    monkeypatch.setitem(sys.modules, "gram_newton_schulz", None)
    assert not external.installed()
    with pytest.raises(ImportError, match="pip install gram-newton-schulz"):
        external.gram_newton_schulz(torch.ones(4, 6))
