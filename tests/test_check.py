"""The check on one process, what it refuses, and its command line."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import distmuon
from distmuon import cli
from distmuon.checking.command import UsageError, load_function, parse_option
from distmuon.checking.compare import ITERATION_ERROR, default_tolerance
from distmuon.checking.report import Measure, worst

SOURCE = """
from torch import nn


def build():
    return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 6), nn.Linear(6, 5))


def halve(model):
    model[1].weight.data.mul_(0.5)
    return model


def shard(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


SIZE = 3
"""


def build():
    return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 6), nn.Dropout(0.1), nn.Linear(6, 5))


def loss(model, step, micro_batch):
    return model(torch.arange(5)).square().sum() * (step + micro_batch)


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / f"source_{tmp_path.name}.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"ns_dtype": torch.float32, "momentum": 0.9}])
def test_one_process_passes_without_a_group(options):
    report = distmuon.check(build, **options)
    assert report.passed, str(report)
    assert report.failures == ()
    assert [row.owner for row in report.rows if row.algorithm == "muon"] == ["each"]
    assert str(report).startswith("distmuon check passed: 1 rank on cpu, drawn gradients")
    skipped = {line.name for line in report.lines if line.passed is None}
    assert skipped == ({"accumulation", "update"} if options.get("foreach") is False else {"accumulation"})


def test_the_tolerance_can_be_given():
    report = distmuon.check(build, tolerance=0.5, steps=1)
    assert all(row.weights.bar >= 0.5 and row.exact.bar == 0.0 for row in report.rows)


def test_gradients_of_batches():
    def smooth():
        return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 6), nn.Linear(6, 5))

    report = distmuon.check(smooth, batch_fn=loss, micro_batches=3)
    assert report.passed, str(report)
    assert "3 micro batches" in str(report)


def test_frozen_and_tied_parameters():
    def tied():
        model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False))
        model[3].weight = model[0].weight
        model[2].requires_grad_(False)
        return model

    report = distmuon.check(tied, batch_fn=loss)
    assert report.passed, str(report)
    assert [row.name for row in report.rows] == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias"]


def test_bfloat16_weights():
    report = distmuon.check(lambda: build().bfloat16())
    assert report.passed, str(report)


def test_a_nan_fails():
    def poisoned(self, closure=None):
        original(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = float("nan")

    original = distmuon.Muon.step
    with mock.patch.object(distmuon.Muon, "step", poisoned):
        report = distmuon.check(build)
    assert [line.name for line in report.lines if line.passed is False] == ["exact", "update", "resume"]
    assert all("'1.weight'" in failure and "relative error inf" in failure for failure in report.failures)


@pytest.mark.parametrize("dtype", ITERATION_ERROR)
def test_the_bar_has_room_for_other_kernels(dtype):
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for m, n in 4 * [(16, 16), (64, 48), (33, 128), (128, 128), (200, 64)]:
        x = torch.randn(m, n, generator=generator)
        alone, other = (
            distmuon.orthogonalize(x, dtype=dtype, coefficients="quintic", engine=engine).double()
            for engine in ("standard", "composed")
        )
        largest = max(largest, float((alone - other).abs().max() / alone.abs().max()))
    # one by one iterates in this dtype, even where batches are held in a wider one
    assert largest <= ITERATION_ERROR[dtype]
    assert default_tolerance(dtype, dtype, torch.device("cpu")) <= ITERATION_ERROR[dtype] + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0}, "steps=0 and micro_batches=2: take 1 or more of each."),
        ({"shard_fn": lambda model: None}, "shard_fn returned a NoneType: return the sharded"),
        ({"shard_fn": lambda model: model[:3]}, "parameter '3.bias' is in the model of model_fn|parameter '3.weight'"),
        ({"lr": -1.0}, "lr"),
    ],
)
def test_what_it_refuses(arguments, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        distmuon.check(build, **arguments)


def test_it_refuses_a_meta_model():
    with pytest.raises(ValueError, match=r"parameter '0.weight' of model_fn is on the meta device"):
        distmuon.check(lambda: build().to("meta"))


def test_the_worst_measure_is_one_that_fails():
    loose, tight = Measure(0.5, 1.0, "weights"), Measure(0.1, 0.0, "weights")
    assert worst([loose, tight]) is tight
    assert worst([loose, Measure(0.2, 1.0, "weights")]) is loose
    assert not Measure(float("nan"), 1.0, "weights").passed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr=0.02", 0.02),
        ("ns_steps=6", 6),
        ("nesterov=false", False),
        ("foreach=None", None),
        ("adamw_betas=(0.9, 0.99)", (0.9, 0.99)),
        ("ns_dtype=float32", torch.float32),
        ("wire_dtype=torch.bfloat16", torch.bfloat16),
        ("ns_coefficients=polar_express", "polar_express"),
        ("muon_names=['blocks.*']", ["blocks.*"]),
    ],
)
def test_values_of_options(text, value):
    assert parse_option(text) == (text.partition("=")[0], value)


def test_functions_by_file_and_by_module(source, monkeypatch, tmp_path):
    assert len(load_function(f"{source}:build")()) == 3
    assert load_function(f"{source}:halve").__globals__ is load_function(f"{source}:build").__globals__
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(load_function(f"{Path(source).stem}:build")()) == 3
    for wrong in ("build", f"{source}:SIZE", f"{source}:bild", "no_such_module_here:build", "no_such.py:build"):
        with pytest.raises(UsageError):
            load_function(wrong)


def test_exit_codes(source, capsys):
    assert cli.main(["check", f"{source}:build", "--steps", "1"]) == 0
    assert "distmuon check passed" in capsys.readouterr().out
    assert cli.main(["check", f"{source}:build", "--shard", f"{source}:halve", "--steps", "1"]) == 1
    assert "start: parameter '1.weight', weights on rank 0" in capsys.readouterr().out


def test_sharding_alone_makes_its_own_group(source, capsys):
    assert cli.main(["check", f"{source}:build", "--shard", f"{source}:shard", "--steps", "1"]) == 0
    assert "S(0) on 1" in capsys.readouterr().out
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "neither MODULE:FUNCTION nor --config is given"),
        (["a.py:f", "--steps", "0"], "--steps is 0"),
        (["a.py:f", "--steps", "x"], "invalid int value"),
        (["a.py:f", "--stepz", "3"], "unrecognized argument --stepz"),
        (["a.py:f", "--option", "lrr=1"], "did you mean lr?"),
        (["a.py:f", "--option", "lr"], "has no value"),
        (["a.py:f"], "there is no file a.py"),
        (["--config", "x.yaml", "--shard", "a.py:f"], "exclude each other"),
        (["--config", "there_is_none.yaml"], "there_is_none.yaml cannot be read"),
    ],
)
def test_bad_usage_is_one_sentence_and_2(arguments, sentence, capsys):
    assert cli.main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
