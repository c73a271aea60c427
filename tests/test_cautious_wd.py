"""Cautious weight decay (arXiv 2510.12402, algorithm 1): of matrices and of the rest, beside float64 by hand."""

import pytest
import torch
from torch import nn

import distmuon
from distmuon.numerics.decay import decay_
from distmuon.numerics.update import apply_direction

LR, DECAY, STEPS = 0.02, 2.0, 20


def masked(weight, update, rate):
    """Weights of which those that ``update``, which is subtracted, makes smaller are decayed."""
    return weight - rate * torch.where(weight * update >= 0, weight, 0.0)


def quintic(matrix):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix) / matrix.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def gradients(shape, steps=STEPS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def tensor(lr):
    return torch.tensor(lr, dtype=torch.float64)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rate", [float, tensor, lambda lr: tensor(lr)[None]], ids=["number", "tensor", "1-D tensor"])
@pytest.mark.parametrize("foreach", [False, None])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_matrices_are_those_of_the_formula(shape, foreach, rate, nesterov):
    weight = torch.randn(shape, dtype=torch.float64)
    param = nn.Parameter(weight.clone())
    optimizer = distmuon.Muon(
        [{"params": [param], "use_muon": True}],
        rate(LR),
        DECAY,
        0.9,
        nesterov,
        ns_coefficients="quintic",
        ns_dtype=torch.float64,
        foreach=foreach,
        cautious_wd=True,
    )
    average = torch.zeros_like(weight)
    for grad in gradients(shape):
        param.grad = grad.clone()
        optimizer.step()
        average = 0.9 * average + 0.1 * grad
        update = quintic(0.1 * grad + 0.9 * average if nesterov else average)
        weight = masked(weight, update, LR * DECAY) - LR * max(1, shape[0] / shape[1]) ** 0.5 * update
    torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        (dict(foreach=False), float),
        (dict(foreach=None), float),
        (dict(foreach=True), float),
        (dict(fused=True), float),
        (dict(foreach=False), tensor),
        (dict(fused=True), tensor),
        (dict(foreach=None), lambda lr: tensor(lr)[None]),
    ],
)
def test_what_adamw_updates_is_that_of_the_formula(settings, rate):
    shapes, (beta1, beta2), eps = [(5, 7), (11,), ()], (0.9, 0.95), 1e-8
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    params = [nn.Parameter(weight.clone()) for weight in weights]
    matrix = nn.Parameter(torch.randn(3, 3))
    groups = [{"params": [matrix], "use_muon": True}, {"params": params, "use_muon": False, "cautious_wd": True}]
    optimizer = distmuon.Muon(groups, 0.02, adamw_lr=rate(LR), adamw_weight_decay=DECAY, adamw_eps=eps, **settings)
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    drawn = [gradients(shape) for shape in shapes]
    for step in range(STEPS):
        for number, (param, grads) in enumerate(zip(params, drawn, strict=True)):
            grad = grads[step]
            param.grad = grad.clone()
            first[number] = beta1 * first[number] + (1 - beta1) * grad
            second[number] = beta2 * second[number] + (1 - beta2) * grad**2
            root = (second[number] / (1 - beta2 ** (step + 1))).sqrt()
            update = first[number] / (1 - beta1 ** (step + 1)) / (root + eps)
            weights[number] = masked(weights[number], update, LR * DECAY) - LR * update
        optimizer.step()
    for param, weight in zip(params, weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("foreach", "dtypes"), [(False, (torch.float32, torch.bfloat16)), (True, (torch.float32,))])
def test_where_all_weights_shrink_the_bits_are_those_of_plain_decay(foreach, dtypes):
    for dtype in dtypes:
        weight = torch.randn(7, 9).to(dtype)
        kept = []
        for cautious in (True, False):
            param, update = weight.clone(), weight.sign().float() * torch.rand(7, 9, generator=torch.manual_seed(4))
            settings = dict(lr=LR, weight_decay=DECAY, scale=0.7, foreach=foreach, exact=not foreach)
            apply_direction([param], [update.bfloat16()], cautious_wd=cautious, **settings)
            kept.append(param)
        assert not torch.equal(kept[0], weight)
        assert torch.equal(*kept)


def test_signs_decide_and_zeros_decay():
    tiny = torch.tensor([1e-30, -1e-30, 1.0, -1.0, 0.0, 3.0])
    update = torch.tensor([-1e-30, -1e-30, 0.0, -0.0, 5.0, -2.0])
    for dtype in (torch.float32, torch.bfloat16):
        weight = tiny.clone()
        decay_(weight, update.to(dtype), 0.5, cautious=True)
        assert weight.tolist() == (tiny * torch.tensor([1, 0.5, 0.5, 0.5, 0.5, 1])).tolist()


def test_a_rate_of_zero_changes_no_weight():
    params = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5))]
    before = [param.detach().clone() for param in params]
    groups = [{"params": params[:1], "use_muon": True}, {"params": params[1:], "use_muon": False}]
    optimizer = distmuon.Muon(groups, 0.0, adamw_lr=0.0, cautious_wd=True)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
    # and it was a step
    assert optimizer.state[params[1]]["step"] == 1
