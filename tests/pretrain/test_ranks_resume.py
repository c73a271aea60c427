"""Checkpoints, signals and errors of a run on several ranks."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import rank_runs
import torch
from checkpoint_states import different, saved_state
from harness import Pool

Tiny = Callable[..., Path]
FLAGS = {"one": [], "fsdp": ["--parallel.dp_shard=2"], "ddp": ["--parallel.dp_replicate=2"], "tp": ["--parallel.tp=2"]}
SHORT = {
    "train__steps": 12,
    "train__eval_every": 0,
    "train__eval_tokens": 128,
    "train__device_batch": 4,
    "model__num_hidden_layers": 2,
}


def run(pool: Pool, layout: str, path: Path, flags: list[str], resume: str | None = None) -> rank_runs.Run:
    if layout == "one":
        return rank_runs.run(path, flags, resume)
    return pool.run(rank_runs.run, path, [*flags, *FLAGS[layout]], resume, timeout=120.0)[0]


@pytest.mark.parametrize("layout", ["fsdp", "ddp", "tp"])
def test_resume_is_exact_in_the_same_layout(tiny: Tiny, two: Pool, layout: str) -> None:
    # dropout differs between ranks, so each has to get its own random numbers back
    changes = {**SHORT, "model__attention_dropout": 0.3}
    whole = run(two, layout, tiny("whole", **changes), [])
    stopped = two.run(rank_runs.run_with_signal, tiny("parts", **changes), FLAGS[layout], 1, 7, timeout=120.0)
    assert {(signum, step, Path(path).name) for signum, step, path in stopped} == {(signal.SIGTERM, 7, "step-7")}
    parts = run(two, layout, tiny("parts", **changes), [], "auto")
    assert parts.losses == whole.losses
    assert parts.norms == whole.norms
    assert parts.validation == whole.validation
    assert [record["step"] for record in parts.records] == list(range(1, 13))
    ends = [saved_state(Path(done.folder) / "checkpoints" / "step-12") for done in (parts, whole)]
    assert different(*ends) == []


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        ("fsdp", "one", "muon"),
        ("one", "fsdp", "muon"),
        ("ddp", "one", "adamw"),
        ("one", "ddp", "muon"),
        ("tp", "fsdp", "muon"),
        ("fsdp", "tp", "adamw"),
    ],
)
def test_a_checkpoint_of_another_layout_goes_on(tiny: Tiny, two: Pool, before: str, after: str, optimizer: str) -> None:
    flags = [f"--optim.name={optimizer}"]
    whole = run(two, "one", tiny("whole", **SHORT), flags)
    # the schedule is that of the whole run, so that the first part is its beginning
    path = tiny("parts", **SHORT)
    if before == "one":
        rank_runs.run_with_signal(path, flags, 0, 7)
    else:
        two.run(rank_runs.run_with_signal, path, [*flags, *FLAGS[before]], 0, 7, timeout=120.0)
    parts = run(two, after, path, flags, "auto")
    # as in test_ranks_layouts: Newton-Schulz begins with a rounding to bfloat16
    rtol = 5e-5 if optimizer == "muon" else 2e-6
    torch.testing.assert_close(parts.losses, whole.losses, rtol=rtol, atol=0.0)
    torch.testing.assert_close(parts.validation, whole.validation, rtol=rtol, atol=0.0)


def test_ranks_that_share_activations_draw_the_same_dropout(tiny: Tiny, two: Pool) -> None:
    """Random numbers of ranks with data of their own are not those of as many ranks that split each matrix."""
    changes = {**SHORT, "train__steps": 4, "model__type": "phi", "model__resid_pdrop": 0.3}
    fsdp = two.run(rank_runs.random_state_after, tiny(**changes), FLAGS["fsdp"], timeout=120.0)
    assert fsdp[0] != fsdp[1]
    tp = two.run(
        rank_runs.random_state_after,
        tiny(
            **changes,
        ),
        [*FLAGS["tp"], "--train.steps=6"],
        "auto",
        timeout=120.0,
    )
    assert tp[0] == tp[1]


def test_a_rank_without_its_data_ends_all_with_its_sentence(tiny: Tiny, two: Pool, tmp_path: Path) -> None:
    path = tiny(**SHORT)
    path.write_text(path.read_text(encoding="utf-8") + "parallel: {dp_shard: 2}\n", encoding="utf-8")
    first, second = two.run(rank_runs.message_without_data, path, 1)
    assert first == second
    assert first[0]
    assert "nowhere-1.txt" in first[1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("on", "what"),
    [
        # DCP's writer, and what only rank 0 does after it
        (0, "torch.distributed.checkpoint.filesystem.FileSystem.create_stream"),
        (1, "torch.distributed.checkpoint.filesystem.FileSystem.create_stream"),
        (0, "distmuon.pretrain.checkpoint.writer.write_manifest"),
        (0, "distmuon.pretrain.checkpoint.store.sync"),
        (1, "distmuon.pretrain.checkpoint.writer.sync"),
    ],
)
def test_a_full_disk_of_one_rank_is_a_sentence_on_all(tiny: Tiny, two: Pool, on: int, what: str) -> None:
    path = tiny(**SHORT)
    path.write_text(path.read_text(encoding="utf-8") + "parallel: {dp_shard: 2}\n", encoding="utf-8")
    first, second = two.run(rank_runs.message_of_full_disk, path, on, what)
    assert first == second
    assert first[0]
    assert "step-6 could not be written" in first[1]
    assert "No space left on device" in first[1]


def test_a_loss_that_is_not_finite_ends_all(tiny: Tiny, two: Pool) -> None:
    path = tiny(**SHORT, optim__name="adamw", optim__lr=1e30, optim__schedule="constant")
    first, second = two.run(rank_runs.message_of, path, FLAGS["fsdp"])
    assert first == second
    assert first[0]
    assert "not finite at step" in first[1]


def test_settings_that_differ_are_a_sentence(tiny: Tiny, two: Pool) -> None:
    found = two.run(rank_runs.message_of_other_steps, tiny(**SHORT), FLAGS["fsdp"])
    assert found[0] == found[1] == (True, found[0][1])
    assert found[0][1].startswith("train.steps is 12 on rank 0 and 13 on rank 1")
