"""Twenty steps beside torch.optim.Muon and torch.optim.AdamW, from the same gradients."""

import pytest
import torch
from torch import nn

import distmuon

SHAPES = {"square": (24, 24), "tall": (40, 16), "wide": (16, 40)}


def parameters(shape, dtype, count=3):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(count)]


def copies(params):
    return [nn.Parameter(param.detach().clone()) for param in params]


def run(optimizers, param_lists, steps=20):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for together in zip(*param_lists, strict=True):
            grad = torch.randn(together[0].shape, generator=generator).to(together[0].dtype)
            for param in together:
                param.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()


def assert_same_bits(expected, actual):
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        assert torch.equal(a, b), f"parameter {index}: largest difference {(a - b).abs().max()}"


# Without bfloat16 gradients and nesterov=False, where torch.optim.Muon 2.13 overwrites its own momentum
KINDS = [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]


@pytest.mark.parametrize(("dtype", "nesterov"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_unbatched_muon_has_the_bits_of_torch(dtype, shape, adjust_lr_fn, nesterov, weight_decay):
    theirs = parameters(SHAPES[shape], dtype)
    ours = copies(theirs)
    settings = dict(lr=0.02, nesterov=nesterov, weight_decay=weight_decay, adjust_lr_fn=adjust_lr_fn)
    expected = torch.optim.Muon(theirs, **settings)
    actual = distmuon.Muon([{"params": ours, "use_muon": True}], foreach=False, **settings)
    run([expected, actual], [theirs, ours])
    assert_same_bits(theirs, ours)
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(expected.state[a]["momentum_buffer"], actual.state[b]["momentum_buffer"])


def test_momentum_survives_where_torch_overwrites_its_own():
    ours = parameters((24, 24), torch.bfloat16, count=1)
    optimizer = distmuon.Muon([{"params": ours, "use_muon": True}], nesterov=False, foreach=False)
    grad = torch.randn(24, 24).bfloat16()
    ours[0].grad = grad.clone()
    optimizer.step()
    expected = torch.zeros_like(grad).lerp_(grad, 1 - 0.95)
    assert torch.equal(optimizer.state[ours[0]]["momentum_buffer"], expected)
    assert torch.equal(ours[0].grad, grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_composed_quintic_is_near_torch(shape, nesterov, native_bf16):
    theirs = parameters(SHAPES[shape], torch.float32)
    ours = copies(theirs)
    expected = torch.optim.Muon(theirs, lr=0.02, nesterov=nesterov)
    group = {"params": ours, "use_muon": True, "ns_coefficients": "quintic"}
    actual = distmuon.Muon([group], lr=0.02, nesterov=nesterov)
    start = [param.detach().clone() for param in theirs]
    run([expected, actual], [theirs, ours])
    for a, b, begin in zip(theirs, ours, start, strict=True):
        assert (a - b).norm() <= 0.02 * (a - begin).norm()


def reference_step(weight, buffer, grad, *, lr, weight_decay, momentum, steps=5):
    """A transcription of the update in float64, from the formulas of the documentation."""
    buffer.copy_(momentum * buffer + (1 - momentum) * grad)
    x = (1 - momentum) * grad + momentum * buffer
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    scale = max(1, weight.size(0) / weight.size(1)) ** 0.5
    weight.copy_((1 - lr * weight_decay) * weight - lr * scale * x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("foreach", [None, False])
def test_float64_follows_the_formulas(shape, foreach):
    ours = parameters(SHAPES[shape], torch.float64)
    weights = [param.detach().clone() for param in ours]
    buffers = [torch.zeros_like(weight) for weight in weights]
    group = {"params": ours, "use_muon": True, "ns_coefficients": "quintic"}
    optimizer = distmuon.Muon([group], lr=0.02, ns_dtype=torch.float64, foreach=foreach)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for param, weight, buffer in zip(ours, weights, buffers, strict=True):
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            reference_step(weight, buffer, param.grad, lr=0.02, weight_decay=0.1, momentum=0.95)
        optimizer.step()
    for param, weight in zip(ours, weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{"foreach": None}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_adamw_groups_have_the_bits_of_torch(dtype, kind):
    theirs = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(50, 8), (8,), (), (3, 4, 5)]]
    ours = copies(theirs)
    matrix = nn.Parameter(torch.randn(8, 8))
    expected = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, **kind)
    actual = distmuon.Muon(
        [{"params": [matrix], "use_muon": True}, {"params": ours, "use_muon": False}],
        adamw_lr=1e-2,
        adamw_betas=(0.8, 0.9),
        adamw_eps=1e-6,
        adamw_weight_decay=0.3,
        **kind,
    )
    run([expected, actual], [theirs, ours])
    assert_same_bits(theirs, ours)


def test_expert_stacks_and_convolutions_equal_separate_matrices():
    stack = nn.Parameter(torch.randn(4, 6, 10))
    kernel = nn.Parameter(torch.randn(6, 5, 2, 1))
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    apart.append(nn.Parameter(kernel.detach().flatten(1).clone()))
    together = distmuon.Muon(
        [
            {"params": [stack], "use_muon": True, "flatten": False},
            {"params": [kernel], "use_muon": True, "flatten": True},
        ],
        lr=0.02,
    )
    separate = distmuon.Muon([{"params": apart, "use_muon": True}], lr=0.02)
    for _ in range(3):
        stack.grad, kernel.grad = torch.randn_like(stack), torch.randn_like(kernel)
        for param, grad in zip(apart, [*stack.grad, kernel.grad.flatten(1)], strict=True):
            param.grad = grad.clone()
        together.step()
        separate.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in apart[:4]]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(kernel.detach().flatten(1), apart[4].detach(), rtol=1e-3, atol=1e-4)
