"""A resumed run computes, bit for bit, what an uninterrupted one does."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_states import different, saved_state
from torch import Tensor

from distmuon.pretrain import Interrupted, Summary, UserError, load_config, train
from distmuon.pretrain.checkpoint import list_checkpoints, newest_checkpoint
from distmuon.pretrain.metrics import MetricsFile, read_metrics
from distmuon.pretrain.progress import Silent

Tiny = Callable[..., Path]
COMPUTED = ("loss_metrics/global_avg_loss", "grad_norm", "lr/muon", "lr/adamw", "validation/loss")


class StopAt(Silent):
    """A display that sends a signal to its own process after a step."""

    def __init__(self, step: int, signum: int) -> None:
        self._step, self._signum = step, signum

    def advance(self, step: int) -> None:
        if step == self._step:
            signal.raise_signal(self._signum)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, signum: int = signal.SIGTERM) -> None:
    monkeypatch.setattr("distmuon.pretrain.run.open_display", lambda *a, **k: StopAt(step, signum))


def computed(run: str | Path) -> list[dict[str, Any]]:
    records = read_metrics(Path(run) / "metrics.jsonl")
    return [{key: record.get(key) for key in ("step", "tokens", *COMPUTED)} for record in records]


def run_in_two(path: Path, monkeypatch: pytest.MonkeyPatch, step: int, *flags: str) -> Summary:
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            train(load_config(path, *flags))
    return train(load_config(path, *flags), resume="auto")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resume_is_exact_over_the_end_of_an_epoch(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    flags = (f"--optim.name={optimizer}",)
    whole = train(load_config(tiny("whole"), *flags))
    # 133 samples, 8 a step: step 17 crosses the end of the first epoch
    parts = run_in_two(tiny("parts"), monkeypatch, 11, *flags)
    assert computed(parts.run_dir) == computed(whole.run_dir)
    assert [record["step"] for record in computed(parts.run_dir)] == list(range(1, 21))
    assert parts.validation_loss == whole.validation_loss
    assert parts.validation_curve == whole.validation_curve
    assert_same_state(parts, whole)


def assert_same_state(parts: Summary, whole: Summary) -> None:
    """Weights, momentum, random numbers, data position and schedule at the end, bit for bit."""
    one, two = (saved_state(Path(summary.checkpoint or "")) for summary in (parts, whole))
    assert different(one, two) == []
    tensors = [name for name, value in one.items() if isinstance(value, Tensor)]
    assert any(name.startswith("app.model.") for name in tensors)
    assert any(name.endswith((".momentum_buffer", ".exp_avg")) for name in tensors)
    assert {"app.train_state.rng", "app.dataloader", "app.lr_scheduler.last_epoch"} <= set(one)


def test_resume_is_exact_with_dropout_and_accumulation(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"model__attention_dropout": 0.3, "train__device_batch": 4}
    whole = train(load_config(tiny("whole", **changes)))
    parts = run_in_two(tiny("parts", **changes), monkeypatch, 7)
    assert computed(parts.run_dir) == computed(whole.run_dir)
    assert_same_state(parts, whole)


@pytest.mark.parametrize("step", [7, 8])
def test_resume_is_exact_between_whole_steps(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Of MuonBP with a period of three steps, and with second moments: the count of steps goes on where it was."""
    flags = ("--optim.block_period=3", "--optim.blocks=2", "--optim.variant=adamuon", "--optim.cautious_wd=true")
    whole = train(load_config(tiny("whole"), *flags))
    parts = run_in_two(tiny("parts"), monkeypatch, step, *flags)
    assert computed(parts.run_dir) == computed(whole.run_dir)
    assert_same_state(parts, whole)


def test_resume_is_exact_with_tied_weights(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"model__tie_word_embeddings": True}
    whole = train(load_config(tiny("whole", **changes)))
    parts = run_in_two(tiny("parts", **changes), monkeypatch, 7)
    assert computed(parts.run_dir) == computed(whole.run_dir)
    assert_same_state(parts, whole)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_end_of_the_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, signum: int) -> None:
    before = signal.getsignal(signum)
    stop_at(monkeypatch, 3, signum)
    with pytest.raises(Interrupted) as stop:
        train(load_config(tiny()))
    assert (stop.value.signum, stop.value.step) == (signum, 3)
    assert stop.value.checkpoint is not None
    assert stop.value.checkpoint.name == "step-3"
    assert signal.getsignal(signum) is before


def test_without_checkpoints_a_signal_says_that_nothing_is_saved(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted, match="nothing is saved"):
        train(load_config(tiny(checkpoint__every=0)))
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()


def test_resume_from_an_older_checkpoint_sets_newer_ones_aside(tiny: Tiny) -> None:
    path = tiny(checkpoint__keep=10)
    whole = train(load_config(path))
    before = computed(whole.run_dir)
    folder = Path(whole.run_dir) / "checkpoints"
    assert [found.name for found in list_checkpoints(folder)] == ["step-6", "step-12", "step-18", "step-20"]
    again = train(load_config(path), resume=str(folder / "step-12"))
    assert Path(again.run_dir) == Path(whole.run_dir).resolve()
    assert computed(again.run_dir) == before
    assert (folder / "step-18.superseded").is_dir()
    assert (folder / "step-18").is_dir()


def test_a_lower_learning_rate_counts_after_a_resume(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny()
    stop_at(monkeypatch, 8)
    with pytest.raises(Interrupted):
        train(load_config(path))
    monkeypatch.undo()
    summary = train(load_config(path, "--optim.lr=1e-3", "--optim.schedule=constant"), resume="auto")
    rates = {record["step"]: record["lr/muon"] for record in computed(summary.run_dir)}
    assert (rates[8], rates[9], rates[20]) == (3e-3, 1e-3, 1e-3)
    assert "optim.lr 0.003 -> 0.001" in caplog.text


def test_auto_goes_on_from_the_newest_whole_checkpoint(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny(checkpoint__keep=10)
    whole = train(load_config(path))
    before = computed(whole.run_dir)
    folder = Path(whole.run_dir) / "checkpoints"
    (folder / "step-20" / ".metadata").unlink()
    shard = folder / "step-18" / "__0_0.distcp"
    size = shard.stat().st_size
    with shard.open("r+b") as stream:
        stream.truncate(1024)
    flip(folder / "step-12" / "__0_0.distcp")
    shutil.copytree(folder / "step-6", folder / ".writing-step-19-0123abcd")
    assert newest_checkpoint(folder) == folder / "step-12"  # which does not look at checksums
    again = train(load_config(path), resume="auto")
    for said in (
        "step-20: .metadata is missing",
        f"step-18: __0_0.distcp is truncated: 1024 of {size} bytes",
        "step-12: __0_0.distcp has another checksum than it was written with",
        ".writing-step-19-0123abcd: it was not written to its end",
    ):
        assert said in caplog.text
    assert computed(again.run_dir) == before
    # what is not whole does not count among those that are kept, and is not in the way of what is written
    assert [found.name for found in list_checkpoints(folder)] == ["step-6", "step-12", "step-18", "step-20"]
    assert (folder / "step-20.superseded").is_dir()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_broken_checkpoint_that_was_asked_for_is_a_sentence(tiny: Tiny) -> None:
    path = tiny(checkpoint__keep=10)
    folder = Path(train(load_config(path)).run_dir) / "checkpoints"
    flip(folder / "step-18" / "__0_0.distcp")
    flip(folder / "step-20" / "__0_0.distcp")
    with pytest.raises(UserError, match=r"step-20 is broken \(.* checksum .*\): resume from .*step-12\.") as caught:
        train(load_config(path), resume=str(folder / "step-20"))
    assert "\n" not in str(caught.value)


def test_auto_does_not_start_anew_beside_broken_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(checkpoint__keep=1)
    folder = Path(train(load_config(path)).run_dir) / "checkpoints"
    (folder / "step-20" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"no whole checkpoint under .*step-20: manifest.json is not a manifest"):
        train(load_config(path), resume="auto")
    assert [found.name for found in (tmp_path / "runs").iterdir()] == ["tiny"]


def test_only_the_newest_checkpoints_stay(tiny: Tiny) -> None:
    summary = train(load_config(tiny(checkpoint__keep=1)))
    assert [found.name for found in (Path(summary.run_dir) / "checkpoints").iterdir()] == ["step-20"]
    assert summary.checkpoint is not None
    assert Path(summary.checkpoint).name == "step-20"


def test_resuming_a_finished_run_says_so(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distmuon.pretrain")
    summary = train(load_config(tiny()))
    again = train(load_config(tiny()), resume="auto")
    assert "is finished" in caplog.text
    assert again.validation_loss == summary.validation_loss
    assert again.validation_curve == summary.validation_curve


def test_a_finished_run_can_be_made_longer(tiny: Tiny) -> None:
    path = tiny(optim__schedule="constant")
    train(load_config(path))
    longer = train(load_config(path, "--train.steps=24"), resume="auto")
    whole = train(load_config(tiny("whole", optim__schedule="constant", train__steps=24)))
    # the shorter run ended with a validation of its own
    losses = [{**record, "validation/loss": None} for record in computed(longer.run_dir)]
    assert losses == [{**record, "validation/loss": None} for record in computed(whole.run_dir)]
    assert longer.validation_loss == whole.validation_loss


def test_auto_without_a_checkpoint_starts_anew(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distmuon.pretrain")
    assert train(load_config(tiny(train__steps=2)), resume="auto").steps == 2
    assert "found no checkpoint" in caplog.text


def test_a_path_without_a_checkpoint_is_a_sentence(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        train(load_config(tiny()), resume=str(tmp_path))


def test_metrics_past_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in range(1, 6)]
    path.write_text("\n".join([*lines, '{"step": 6, "lo']), encoding="utf-8")
    with MetricsFile(path, after_step=3) as metrics:
        metrics.write({"step": 4, "new": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "new": True}]
