"""The code of docs/family.md runs: every line makes an optimizer that steps."""

import pathlib
import re

import pytest
import torch
import transformers

import distmuon

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "family.md"
LINES = [
    line for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) for line in block.splitlines()
]
# Of distmuon's next version
NOT_YET = () if hasattr(distmuon, "Scion") else ("Scion",)


def make():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(num_hidden_layers=1, vocab_size=32, **sizes)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("line", [line for line in LINES if not any(name in line for name in NOT_YET)])
def test_line(line):
    scope = {"distmuon": distmuon, "model": make()}
    exec(line, scope)
    model, optimizer = scope["model"], scope["optimizer"]
    tokens = torch.arange(16).reshape(2, 8)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(not torch.equal(before[name], param) for name, param in model.named_parameters())


def test_every_rule_has_a_line():
    """A page whose code no expression finds would pass the rest."""
    for name in ('"normuon"', '"adamuon"', "block_period", "cautious_wd", "Scion(", "MuonClip(", '"spectral"'):
        assert any(name in line for line in LINES), name
