"""The check passes on sound layouts and, where something is wrong on purpose, fails and names the parameter."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import check_models
import pytest
import torch
import torch.distributed as dist
from harness import Pool

import distmuon
from distmuon import cli
from distmuon.checking.compare import default_tolerance

HERE = Path(check_models.__file__)
LINES = ["start", "exact", "update", "replicas", "accumulation", "resume"]


@pytest.fixture(scope="module")
def pool2():
    with Pool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def pool4():
    with Pool(4) as pool:
        yield pool


# --- what ranks run


def run_check(shard, batch=None, optimizer="Muon", **options):
    kind = getattr(check_models, optimizer, distmuon.Muon)
    with mock.patch("distmuon.checking.sides.Muon", kind):
        report = distmuon.check(
            check_models.build_model,
            shard and getattr(check_models, shard),
            batch_fn=batch and getattr(check_models, batch),
            **options,
        )
    return report


def run_command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {"RANK": str(dist.get_rank())}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = cli.main(["check", *arguments])
    return code, out.getvalue(), err.getvalue()


def raises_on_rank_1():
    def loss(model, step, micro_batch):
        if dist.get_rank() == 1:
            raise KeyError("no such batch")
        return check_models.loss(model, step, micro_batch)

    with pytest.raises(Exception) as caught:
        distmuon.check(check_models.build_model, batch_fn=loss)
    return f"{caught.type.__name__}: {caught.value}"


def clears_gradients():
    def loss(model, step, micro_batch):
        model.zero_grad()
        return check_models.loss(model, step, micro_batch)

    return distmuon.check(check_models.build_model, check_models.ddp, batch_fn=loss)


# --- tests


def same_on_all(reports):
    assert all(report == reports[0] and str(report) == str(reports[0]) for report in reports)
    return reports[0]


def failing(report):
    return [line.name for line in report.lines if line.passed is False]


@pytest.mark.parametrize(
    ("ranks", "shard", "batch", "layout"),
    [
        (2, "fsdp2", None, "S(0) on 2"),
        (2, "fsdp2", "loss", "S(0) on 2"),
        (2, "ddp", "loss", "whole"),
        (2, "tp", "same_loss", "S(1) on 2"),
        (4, "hsdp", "loss", "R, S(0) on 2x2"),
    ],
)
def test_passes(pool2, pool4, ranks, shard, batch, layout):
    pool = {2: pool2, 4: pool4}[ranks]
    report = same_on_all(pool.run(run_check, shard, batch))
    assert report.passed, str(report)
    assert [line.name for line in report.lines] == LINES
    assert [line.passed for line in report.lines] == [True] * 4 + [None if batch is None else True, True]
    rows = {row.name: row for row in report.rows}
    assert list(rows) == [name for name, _ in check_models.build_model().named_parameters()]
    assert rows["3.weight"].layout == layout
    assert {rows["1.weight"].owner, rows["3.weight"].owner} <= set(map(str, range(ranks)))
    assert {name for name, row in rows.items() if row.algorithm == "muon"} == {"1.weight", "3.weight"}
    assert all(row.exact.error == 0.0 and row.exact.bar == 0.0 for row in report.rows)
    assert all(0.0 < row.weights.bar < 0.3 for row in report.rows)


def test_options_reach_the_optimizer(pool4):
    report = same_on_all(pool4.run(check_hsdp_repeating))
    assert report.passed, str(report)
    assert {row.owner for row in report.rows if row.algorithm == "muon"} == {"0,2", "1,3"}


def check_hsdp_repeating():
    options = {"replicas": "repeat", "adjust_lr_fn": "match_rms_adamw", "lr": 3e-3, "weight_decay": 0.0}
    return distmuon.check(check_models.build_model, check_models.hsdp, steps=1, **options)


def test_a_shard_that_is_not_updated(pool2):
    report = same_on_all(pool2.run(run_check, "fsdp2", None, "SkipsAShard"))
    assert failing(report) == ["exact", "update"]
    assert not report.passed
    for failure in report.failures:
        assert failure.startswith(
            ("exact: parameter '3.weight', weights at step ", "update: parameter '3.weight', ")
        ), failure
        assert float(re.search(r" on rank 0: relative error (\S+),", failure)[1]) > 0.5
    assert "the same bits are wanted" in report.failures[0]
    # 0.125 where iterates are in bfloat16 and 1e-4 in float32, two roundings to the wire and those of the weights
    bar = default_tolerance(torch.bfloat16, torch.bfloat16, torch.device("cpu"))
    assert 0.95 * bar <= float(re.search(r"the bar is (\d\S+\d)", report.failures[1])[1]) <= 1.1 * bar


def test_replicas_that_part(pool2):
    report = same_on_all(pool2.run(run_check, "ddp", None, "SkipsAShard"))
    assert failing(report) == ["exact", "update", "replicas"]
    replicas = [failure for failure in report.failures if failure.startswith("replicas")]
    assert len(replicas) == 2  # after the exact steps, and after those with the given options
    for failure in replicas:
        assert "'3.weight'" in failure and "on rank 1" in failure and "differ from those of rank 0" in failure


def test_gradients_that_nobody_averages(pool2):
    report = same_on_all(pool2.run(run_check, None, "loss"))
    assert failing(report) == ["replicas"]
    assert {row.owner for row in report.rows if row.algorithm == "muon"} == {"each"}


def test_only_the_batched_path_is_wrong(pool2):
    report = same_on_all(pool2.run(run_check, "fsdp2", None, "WrongWhenBatched"))
    assert failing(report) == ["update"]
    assert {failure.split("'")[1] for failure in report.failures} == {"1.weight", "3.weight"}


def test_sharding_that_changes_a_weight(pool2):
    report = same_on_all(pool2.run(run_check, "changes_a_weight"))
    assert failing(report) == ["start"]
    assert [failure.split("'")[1] for failure in report.failures] == ["3.weight"]


def test_momentum_that_is_lost_on_loading(pool2):
    report = same_on_all(pool2.run(run_check, "fsdp2", None, "ForgetsMomentum"))
    assert failing(report) == ["resume"]
    assert {failure.split("'")[1] for failure in report.failures} == {"1.weight", "3.weight"}


def test_gradients_that_are_not_accumulated(pool2):
    report = same_on_all(pool2.run(clears_gradients))
    assert failing(report) == ["accumulation"]


def test_an_error_on_one_rank_is_raised_on_all(pool2):
    told = "KeyError: 'no such batch'"
    assert pool2.run(raises_on_rank_1) == [f"RuntimeError: rank 1: {told}", told]


def test_command_prints_on_the_first_rank_and_exits_alike_on_all(pool2):
    passed = [run for run in pool2.run(run_command, f"{HERE}:build_model", "--shard", f"{HERE}:fsdp2")]
    assert [(code, err) for code, _, err in passed] == [(0, "")] * 2
    assert passed[0][1].startswith("distmuon check passed: 2 ranks on cpu")
    assert passed[1][1] == ""
    failed = pool2.run(run_command, f"{HERE}:build_model", "--shard", f"{HERE}:changes_a_weight", "--steps", "1")
    assert [code for code, _, _ in failed] == [1, 1]
    assert "start: parameter '3.weight'" in failed[0][1]
    misused = pool2.run(run_command, f"{HERE}:build_modl")
    assert [code for code, _, _ in misused] == [2, 2]
    assert [len(err.splitlines()) for _, _, err in misused] == [1, 0]


def test_command_checks_a_config(pool2, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "model:\n  config: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2}\n"
        "data: {sequence_length: 8}\ntrain: {steps: 1}\n"
    )
    for layout in ("dp_shard", "dp_replicate"):
        runs = pool2.run(run_command, "--config", str(path), f"--parallel.{layout}", "2", "--steps", "1")
        assert [code for code, _, _ in runs] == [0, 0], runs
        assert "model.layers.1.mlp.down_proj.weight" in runs[0][1]
    runs = pool2.run(run_command, "--config", str(path), "--parallel.dp_shard", "3")
    assert [code for code, _, _ in runs] == [2, 2]
    assert "set parallel.dp_shard to 2" in runs[0][2]


@pytest.mark.slow
def test_torchrun_fails_with_the_name_of_the_parameter():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "distmuon", "check", f"{HERE}:build_model", "--shard", f"{HERE}:changes_a_weight"]
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "start: parameter '3.weight', weights on rank" in done.stdout
    assert "exitcode  : 1" in done.stderr
