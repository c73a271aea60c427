"""Whole tiny runs: what they compute and what they leave in the run folder."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distmuon.pretrain import Summary, UserError, load_config, train
from distmuon.pretrain.metrics import read_metrics

Tiny = Callable[..., Path]
NAMES = {
    "step",
    "tokens",
    "seconds",
    "loss_metrics/global_avg_loss",
    "grad_norm",
    "throughput(tps)",
    "time_metrics/end_to_end(s)",
    "time_metrics/data_loading(s)",
    "memory/max_reserved(GiB)",
    "optim/step_ms",
    "optim/pct_of_step",
    "lr/muon",
    "lr/adamw",
    "validation/loss",
    "validation/bits_per_byte",
}


def losses(summary: Summary) -> list[float]:
    records = read_metrics(Path(summary.run_dir) / "metrics.jsonl")
    return [record["loss_metrics/global_avg_loss"] for record in records]


def test_the_run_folder_has_everything(tiny: Tiny) -> None:
    path = tiny(log__plot=True, log__tensorboard=True, train__sample_tokens=5, train__sample_prompt="ab")
    summary = train(load_config(path))
    folder = Path(summary.run_dir)
    assert {found.name for found in folder.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "routing.txt",
        "summary.json",
        "tensorboard",
    }
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "lm_head.weight" in (folder / "routing.txt").read_text(encoding="utf-8")
    assert load_config(folder / "config.yaml").model.config["vocab_size"] == 257
    assert summary.sample is not None
    assert summary.sample.startswith("ab")
    assert Summary.load(folder / "summary.json") == summary
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"] == 20


def test_metrics_have_their_names_and_the_loss_falls(tiny: Tiny) -> None:
    summary = train(load_config(tiny()))
    records = read_metrics(Path(summary.run_dir) / "metrics.jsonl")
    assert set(records[-1]) == NAMES
    assert set(records[0]) == NAMES - {"validation/loss", "validation/bits_per_byte"}
    assert [record["step"] for record in records if "validation/loss" in record] == [8, 16, 20]
    assert summary.validation_curve == [(2048, pytest.approx(5, abs=1)), *summary.validation_curve[1:]]
    assert losses(summary)[0] == pytest.approx(math.log(257), abs=0.1)
    assert losses(summary)[-1] < losses(summary)[0] - 0.3
    assert records[-1]["tokens"] == summary.tokens == 20 * 256
    assert all(record["seconds"] > 0 for record in records)


def test_routing_states_peak_learning_rates(tiny: Tiny) -> None:
    summary = train(load_config(tiny(train__steps=1)))
    table = (Path(summary.run_dir) / "routing.txt").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith("lm_head"))
    assert line.split()[-1] == "0.003"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_repeats_itself_and_never_overwrites(tiny: Tiny, optimizer: str) -> None:
    path = tiny(train__steps=5, optim__name=optimizer, checkpoint__every=0)
    first, second = train(load_config(path)), train(load_config(path))
    assert losses(first) == losses(second)
    assert [Path(run.run_dir).name for run in (first, second)] == ["tiny", "tiny-2"]
    assert first.checkpoint is None


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_changes_nothing_but_rounding(tiny: Tiny, optimizer: str) -> None:
    changes = {"train__steps": 6, "optim__name": optimizer, "checkpoint__every": 0}
    whole = train(load_config(tiny("whole", train__device_batch=8, **changes)))
    parts = train(load_config(tiny("parts", train__device_batch=2, **changes)))
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-4, atol=1e-4)
    assert parts.validation_loss == pytest.approx(whole.validation_loss, rel=1e-3)


def test_activation_checkpointing_changes_nothing(tiny: Tiny) -> None:
    changes = {"train__steps": 4, "checkpoint__every": 0}
    plain = train(load_config(tiny("plain", **changes)))
    checkpointed = train(load_config(tiny("ac", train__activation_checkpointing=True, **changes)))
    torch.testing.assert_close(losses(checkpointed), losses(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiling_changes_nothing_but_rounding(tiny: Tiny) -> None:
    changes = {"train__steps": 7}
    plain = train(load_config(tiny("plain", **changes)))
    # the checkpoint of a compiled model has the names of a plain one
    compiled = train(load_config(tiny("compiled", train__compile=True, **changes), "--train.steps=6"))
    torch.testing.assert_close(losses(compiled)[:4], losses(plain)[:4], rtol=1e-4, atol=1e-4)
    longer = train(load_config(tiny("compiled", **changes)), resume="auto")
    torch.testing.assert_close(losses(longer)[-1], losses(plain)[-1], rtol=2e-2, atol=2e-2)


def test_bfloat16_runs_near_float32(tiny: Tiny) -> None:
    changes = {"train__steps": 4, "checkpoint__every": 0}
    exact = train(load_config(tiny("exact", **changes)))
    rounded = train(load_config(tiny("rounded", train__dtype="bfloat16", **changes)))
    assert losses(rounded) != losses(exact)
    torch.testing.assert_close(losses(rounded), losses(exact), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 1}),
        ("qwen3", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}),
    ],
)
def test_other_models_of_transformers_train(tiny: Tiny, kind: str, sizes: dict[str, int]) -> None:
    config = load_config(tiny(model__type=kind, train__steps=3, train__eval_every=0, checkpoint__every=0))
    config.model.config = sizes if kind == "gpt2" else {**sizes, "num_key_value_heads": 2, "head_dim": 8}
    assert losses(train(config))[-1] < 6


def test_gradient_clipping_can_be_off(tiny: Tiny) -> None:
    changes = {"train__steps": 4, "checkpoint__every": 0, "optim__name": "adamw"}
    off = train(load_config(tiny("off", optim__grad_clip=0.0, **changes)))
    on = train(load_config(tiny("on", optim__grad_clip=0.01, **changes)))
    norms = [read_metrics(Path(run.run_dir) / "metrics.jsonl")[0]["grad_norm"] for run in (off, on)]
    assert norms[0] == norms[1] > 0.01


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(tiny: Tiny) -> None:
    path = tiny(optim__name="adamw")
    train(load_config(path, "--train.steps=6"))
    with pytest.raises(UserError, match=r"not finite at step \d+ with optim.lr 1e\+30.*--resume auto"):
        train(load_config(path, "--optim.lr=1e30", "--optim.schedule=constant"), resume="auto")
    runs = Path(load_config(path).log.dir)
    assert (runs / "tiny" / "checkpoints" / "step-6" / ".metadata").exists()
    assert all(
        math.isfinite(record["loss_metrics/global_avg_loss"]) for record in read_metrics(runs / "tiny/metrics.jsonl")
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__vocab_size": 100}, "vocab_size to at least 257"),
        ({"data__sequence_length": 5000, "train__global_batch_tokens": 40000}, "data.sequence_length"),
        ({"data__source": "nowhere.txt"}, "nowhere.txt"),
        ({"train__device_batch": 3}, "train.device_batch to 2"),
        ({"train__device": "warp"}, "train.device is 'warp'"),
        ({"optim__ns_coefficients": "magic"}, "the optimizer refuses the optim section"),
        ({"model__num_attention_heads": 3}, "transformers"),
    ],
)
def test_nothing_is_written_when_a_setting_cannot_work(
    tiny: Tiny, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError) as error:
        train(load_config(tiny(**changes)))
    assert words in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_several_processes_are_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"set parallel\.dp_shard to 2"):
        train(load_config(tiny()))


def test_lines_tell_the_numbers(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distmuon.pretrain")
    train(load_config(tiny(train__steps=2)))
    text = caplog.text
    for word in ("float32", "step 1/2  loss 5.", "tok/s", "validation loss", "bits/byte", "done: "):
        assert word in text
