import pytest
import torch
from hypothesis import settings

from distmuon.numerics import recipe

# Timing of a shared machine is no property of the code
settings.register_profile("distmuon", deadline=None)
settings.load_profile("distmuon")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def native_bf16(monkeypatch):
    """Iterate in bfloat16 even where the machine would emulate it: slow, so for small matrices only."""
    monkeypatch.setattr("distmuon.numerics.hardware.has_native_bf16", lambda device_type: True)
    # recipes are remembered, and a machine does not change otherwise
    recipe.forget()
    yield
    recipe.forget()
