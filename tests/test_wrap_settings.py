"""Settings of an optimizer that its matrices cannot take along to Muon."""

import pytest
import torch
from torch import nn

import distmuon


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6), nn.Linear(6, 8))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_matrices_of_a_group_that_maximizes_are_refused(kind):
    model = make_model()
    optimizer = kind(model.parameters(), lr=1e-3, maximize=True)
    with pytest.raises(ValueError, match=r"maximize=True, and Muon minimizes: negate the loss.*adamw_names"):
        distmuon.wrap(model, optimizer, lr=1e-3)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_what_stays_may_maximize():
    model = make_model()
    matrices, rest = [model[1].weight, model[3].weight], [model[0].weight, model[4].weight]
    optimizer = torch.optim.AdamW([{"params": rest, "maximize": True}, {"params": matrices[:1]}], lr=1e-3)
    wrapped = distmuon.wrap(model, optimizer)
    assert wrapped.inner.param_groups[0]["maximize"]
    with pytest.raises(ValueError, match="maximize=True, and Muon minimizes"):
        wrapped.add_param_group({"params": matrices[1:], "maximize": True})
    assert [len(group["params"]) for group in wrapped.param_groups] == [1, 2]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = [param.clone() for param in (matrices[0], rest[0])]
    wrapped.step()
    assert (matrices[0] - before[0]).mean() < 0 < (rest[0] - before[1]).mean()
