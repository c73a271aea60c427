"""Clipping on one process is torch's, bit for bit."""

import math

import pytest
import torch
from torch import nn

from distmuon import clip_grad_norm_


def parameters_with_gradients(dtypes=(torch.float32,), scale=1.0):
    generator = torch.Generator().manual_seed(3)
    params = []
    for dtype in dtypes:
        for shape in ((7, 5), (3,), (), (0, 4), (2, 3, 4)):
            params.append(nn.Parameter(torch.zeros(shape, dtype=dtype)))
            params[-1].grad = scale * torch.randn(shape, generator=generator).to(dtype)
    params.append(nn.Parameter(torch.zeros(4)))  # stays without a gradient
    return params


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2, 2.0, 1.0, 3.5, 0.5])
@pytest.mark.parametrize("max_norm", [0.3, 1e4])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16, torch.float64)]
)
def test_equals_torch_bitwise(norm_type, max_norm, foreach, dtypes):
    ours, theirs = parameters_with_gradients(dtypes), parameters_with_gradients(dtypes)
    total = clip_grad_norm_(ours, max_norm, norm_type, False, foreach)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm, norm_type, False, foreach)
    assert total.dtype == expected.dtype and torch.equal(total, expected)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("norm_type", [math.inf, "inf"])
def test_largest_value(norm_type):
    # torch refuses the largest value of an empty tensor
    ours, theirs = ([p for p in parameters_with_gradients() if p.numel()] for _ in range(2))
    total = clip_grad_norm_(ours, 0.1, norm_type)
    assert torch.equal(total, nn.utils.clip_grad_norm_(theirs, 0.1, norm_type))
    assert all(p.grad is None or torch.equal(p.grad, q.grad) for p, q in zip(ours, theirs, strict=True))


def test_module_generator_and_tensor_are_taken():
    def model():
        torch.manual_seed(1)
        made = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        made(torch.ones(3, 4)).square().sum().backward()
        return made

    expected = nn.utils.clip_grad_norm_(model().parameters(), 0.1)
    assert torch.equal(clip_grad_norm_(model(), 0.1), expected)
    assert torch.equal(clip_grad_norm_(model().parameters(), 0.1), expected)
    weight = model()[0].weight
    total = clip_grad_norm_(weight, 0.1)
    assert not total.requires_grad
    torch.testing.assert_close(weight.grad.norm(), torch.tensor(0.1), rtol=1e-4, atol=0)  # max_norm/(norm + 1e-6)


def test_nothing_to_clip():
    assert torch.equal(clip_grad_norm_([], 1.0), torch.tensor(0.0))
    assert torch.equal(clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0), torch.tensor(0.0))
    used = (p for p in ())
    with pytest.warns(UserWarning, match="empty generator") as caught:
        clip_grad_norm_(used, 1.0)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_nonfinite(value):
    params = parameters_with_gradients()
    params[0].grad[2, 3] = value
    before = params[1].grad.clone()
    with pytest.raises(RuntimeError, match="error_if_nonfinite"):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert torch.equal(params[1].grad, before)
    assert not clip_grad_norm_(params, 1.0).isfinite()


def test_owners_on_one_process():
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    total = clip_grad_norm_(ours, 0.1, owners={ours[0]: 0})
    assert torch.equal(total, nn.utils.clip_grad_norm_(theirs, 0.1))
    with pytest.raises(ValueError, match=r"shape \(3,\) to rank 1.*1 ranks"):
        clip_grad_norm_(ours, 0.1, owners={ours[1]: 1})
