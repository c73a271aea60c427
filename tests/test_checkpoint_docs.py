"""The code of docs/checkpoints.md runs, and restores what was saved."""

import json
import pathlib
import re
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import distmuon
import distmuon.checkpoint

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "checkpoints.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def block_with(text):
    """The first example that has this text; here there is no process group."""
    found = next(block for block in BLOCKS if text in block)
    return found.replace('checkpoint_id="step-1000")', 'checkpoint_id="step-1000", no_dist=True)')


def make(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    return model, distmuon.Muon(model, lr=0.02, adamw_lr=1e-3)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, optimizer = make(0)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def run(code, model, optimizer, **names):
    scope = {"model": model, "optimizer": optimizer, "rank": 0, "torch": torch, "json": json, "distmuon": distmuon}
    scope |= {"set_optimizer_state_dict": set_optimizer_state_dict, **names}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # DCP warns where there is one process
        exec(code, scope)
    return scope


@pytest.mark.parametrize(
    ("text", "load_begins"),
    [
        ("dcp.save", "model_state, optimizer_state = get_state_dict(model, optimizer)  #"),
        ("StateDictOptions(full_state_dict=True)", "# all ranks read"),
        ("torch.save(optimizer.state_dict()", "optimizer.load_state_dict"),
    ],
)
def test_saving_and_loading(saved, text, load_begins):
    save, load = block_with(text).split(load_begins)
    scope = run(save, *saved)
    model, optimizer = make(1)
    run(load_begins + load, **{**scope, "model": model, "optimizer": optimizer})
    for param, twin in zip(saved[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(param, twin) == ("model_state" in load)
        for key, value in saved[1].state[param].items():
            assert torch.equal(optimizer.state[twin][key], value)


def test_reset(saved):
    first, rest = block_with("changed=").split("\n", 1)
    run(first, *saved, state=saved[1].state_dict())
    run(rest, *saved, state=get_optimizer_state_dict(*saved))


def test_comparing_tables(saved, tmp_path):
    (tmp_path / "step-1000").mkdir()
    code = block_with("routing_table")
    run(code, *saved)
    save, compare = code.split("\nif changed")
    run(save, *saved)
    model, _ = saved
    other = distmuon.Muon(model, adamw_lr=1e-3, adamw_names=["1.weight"])
    imports = "from distmuon.checkpoint import differences, routing_table\n"
    with pytest.raises(ValueError, match=re.escape("'1.weight' was on Muon and is on AdamW now")):
        run(f"{imports}if changed{compare}", model, other)
