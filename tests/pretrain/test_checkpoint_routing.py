"""A checkpoint of an optimizer that routed parameters differently is refused before anything is loaded, or reset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_states import TinyRun, local, message_of, saved_state
from harness import Pool
from torch import nn

import distmuon
from distmuon.pretrain import UserError, load_config, train
from distmuon.pretrain.checkpoint import list_checkpoints, load_checkpoint

Tiny = Callable[..., Path]


def save(run: TinyRun, folder: Path) -> Path:
    with run.saver(folder) as saver:
        return saver.save(int(run.state.progress["step"]))


def test_the_manifest_says_who_wrote_it(tmp_path: Path) -> None:
    content = json.loads((save(TinyRun().train(2), tmp_path) / "manifest.json").read_text())
    assert {key: content[key] for key in ("step", "world_size", "layout", "torch", "distmuon")} == {
        "step": 2,
        "world_size": 1,
        "layout": "a test",
        "torch": torch.__version__,
        "distmuon": distmuon.__version__,
    }
    assert content["routing"] == {
        "0.weight": {"on": "muon", "shape": [7, 5]},
        "0.bias": {"on": "adamw", "shape": [7]},
        "1.weight": {"on": "muon", "shape": [5, 7]},
    }
    assert set(content["files"]) == {".metadata", "__0_0.distcp"}


def test_a_change_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    path = save(TinyRun().train(2), tmp_path)
    other = TinyRun(seed=1, adamw_names=("1.weight",))
    before = [local(param) for param in other.model.parameters()]
    with mock.patch("distmuon.pretrain.checkpoint.loading.dcp_load", side_effect=AssertionError("it loads")):
        said = message_of(load_checkpoint, path, other.state)
    assert said == (
        f"the checkpoint {path} was written by an optimizer that routed parameters differently ('1.weight' was on Muon "
        "and is on AdamW now): restore the settings, or start the optimizer state of these parameters anew with "
        "--checkpoint.routing_changes reset."
    )
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.parameters(), strict=True))


def reset(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str], float]:
    """What a run saved, what one with other routes loaded, whose state it has, and AdamW's step of the changed one."""
    first = TinyRun().train(3)
    with first.saver(folder) as saver:
        path = saver.save(3)
        saver.wait()
    other = TinyRun(seed=1, adamw_names=("1.weight",))
    load_checkpoint(path, other.state, "reset")
    named = dict(other.model.named_parameters())
    has_state = [name for name in named if other.optimizer.state.get(named[name])]
    loaded = {key: value for key, value in other.values().items() if isinstance(value, torch.Tensor)}
    other.train(2)
    saved = {key: value for key, value in first.values().items() if isinstance(value, torch.Tensor)}
    return saved, loaded, has_state, float(other.optimizer.state[named["1.weight"]]["step"])


def test_reset_starts_the_state_of_changed_parameters_anew(two: Pool, tmp_path: Path) -> None:
    for saved, loaded, has_state, step in (reset(tmp_path / "one"), *two.run(reset, tmp_path / "two")):
        assert set(saved) - set(loaded) == {"1.weight.momentum_buffer"}
        assert all(torch.equal(saved[name], loaded[name]) for name in loaded if name != "random")
        assert has_state == ["0.weight", "0.bias"]
        assert step == 2


def test_weights_that_are_not_there_are_an_error_with_reset_too(tmp_path: Path) -> None:
    path = save(TinyRun().train(1), tmp_path)
    wider = TinyRun()
    wider.model[1] = nn.Linear(7, 6, bias=False)
    wider.optimizer = distmuon.Muon(wider.model.named_parameters(), adjust_lr_fn="match_rms_adamw")
    wider.state._optimizer = wider.optimizer
    said = message_of(load_checkpoint, path, wider.state, "reset")
    assert "does not hold the weights of this model ('1.weight' had shape (5, 7) and has (6, 7) now)" in said
    said = message_of(load_checkpoint, path, wider.state)
    assert "routed parameters differently ('1.weight' had shape (5, 7) and has (6, 7) now)" in said


@pytest.mark.parametrize(("before", "after"), [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_goes_on_with_reset(tiny: Tiny, before: str, after: str) -> None:
    path = tiny(train__steps=4, checkpoint__every=2, checkpoint__keep=10)
    folder = Path(train(load_config(path, f"--optim.name={before}")).run_dir) / "checkpoints"
    changed = load_config(path, f"--optim.name={after}", "--train.steps=6")
    with pytest.raises(UserError, match=f"optim.name {before}"):
        train(changed, resume="auto")
    changed.checkpoint.routing_changes = "reset"
    train(changed, resume="auto")
    assert [found.name for found in list_checkpoints(folder)] == ["step-2", "step-4", "step-6"]
    old, new = saved_state(folder / "step-4"), saved_state(folder / "step-6")
    # AdamW counts on where it went on, and began anew where it did not
    steps = {float(value) for name, value in new.items() if ".state." in name and name.endswith(".step")}
    assert steps == ({6.0, 2.0} if before == "muon" else {6.0})
    assert {name for name in old if name.startswith("app.model.")} == {n for n in new if n.startswith("app.model.")}
