"""The bars: as near to the polar factor as torch.optim.Muon on every family of matrices, real ones too."""

import pytest
import torch
from matrices import FAMILIES, closeness, momenta
from torch.optim._muon import _zeropower_via_newtonschulz

from distmuon import orthogonalize
from distmuon.numerics.coefficients import TABLES

SHAPES = ((64, 64), (64, 256), (256, 64), (128, 128))
# "cubic" trades accuracy for products, as its source in the table says
TABLES_WITHIN_THE_BARS = [name for name in TABLES if name != "cubic"]


def check(x, table):
    quintic = (3.4445, -4.7750, 2.0315)
    torchs = closeness(x, _zeropower_via_newtonschulz(x.clone(), quintic, 5, 1e-7))
    # Rounding moves torch's lowest value up or down; its polynomial without rounding is the other measure
    unrounded = closeness(x, orthogonalize(x.double(), coefficients="quintic", steps=5))
    ours = orthogonalize(x, coefficients=table, dtype=torch.bfloat16)
    found = closeness(x, ours)
    assert torch.isfinite(ours).all()
    assert found.error <= torchs.error + 0.005
    assert found.low >= min(torchs.low, unrounded.low) - 0.02
    assert found.low > 0
    assert found.high <= 1.22
    assert found.off <= 0.06


@pytest.mark.parametrize("table", TABLES_WITHIN_THE_BARS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_families(family, table):
    for shape in SHAPES:
        check(family(*shape, torch.Generator().manual_seed(1)), table)


@pytest.mark.parametrize("table", TABLES_WITHIN_THE_BARS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_families_in_native_bf16(family, table, native_bf16):
    for shape in SHAPES[:3]:
        check(family(*shape, torch.Generator().manual_seed(1)), table)


@pytest.fixture(scope="module")
def real_momenta():
    return momenta()


@pytest.mark.parametrize("table", TABLES_WITHIN_THE_BARS)
def test_real_momenta(real_momenta, table):
    for x in real_momenta:
        check(x, table)


@pytest.mark.parametrize("table", TABLES_WITHIN_THE_BARS)
def test_real_momenta_in_native_bf16(real_momenta, table, native_bf16):
    for x in real_momenta:
        check(x, table)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_converged_iteration_in_float32(family):
    for shape in SHAPES:
        x = family(*shape, torch.Generator().manual_seed(1))
        assert closeness(x, orthogonalize(x, coefficients="polar_express", steps=10)).error <= 1e-5
