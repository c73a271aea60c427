"""The Trainer of transformers computes what its loop computes by hand on one process."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate_cases import alone
from trainer_cases import RATES, STEPS, Tracker, by_hand, small_model, trained, trained_sharded
from transformers import TrainerState

import distmuon
from distmuon.integrations.transformers import MuonFactory, MuonMetrics


def assert_same(found, wanted, tolerance=0.0):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("how", ["factory", "object"])
def test_one_process_and_resumed(tmp_path, how):
    """Accumulation, clipping, warm-up and schedule."""
    with alone():
        weights, log, _, _ = trained(tmp_path, how)
        again = trained(tmp_path, how, f"checkpoint-{STEPS // 2}")
    wanted, losses = by_hand(1, how)
    assert_same(weights, wanted, 1e-6)
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert log[-1]["loss"] < log[0]["loss"]
    assert_same(again[0], weights)


@pytest.mark.parametrize(
    ("train", "how", "kind"),
    [(trained, "factory", "MULTI_CPU"), (trained, "object", "MULTI_CPU"), (trained_sharded, "factory", "FSDP")],
)
def test_two_processes_and_resumed(pool, tmp_path, train, how, kind):
    wanted, losses = by_hand(2, how)
    found = pool.run(train, tmp_path, how)
    again = pool.run(train, tmp_path, how, f"checkpoint-{STEPS // 2}")
    for (weights, _, owners, distributed), resumed in zip(found, again, strict=True):
        assert distributed == kind
        # the replicas of DDP share the work
        assert owners == ({0, 1} if kind == "MULTI_CPU" else set())
        assert_same(weights, wanted, 1e-5)
        assert_same(resumed[0], weights)
    assert [entry["loss"] for entry in found[0][1]] == pytest.approx(losses, rel=1e-4)


def test_metrics(tmp_path):
    Tracker.seen = ()
    with alone():
        _, log, _, _ = trained(tmp_path, "factory")
    assert len(log) == STEPS
    assert [seen["lr/muon"] for seen in Tracker.seen if "loss" in seen] == [entry["lr/muon"] for entry in log]
    report = distmuon.Muon(small_model(), **RATES).report()
    scales = [row.lr / RATES["lr"] for row in report.rows if row.algorithm == "muon"]
    for entry in log:
        # the rate of the step itself, as the Trainer logs it
        assert entry["lr/muon"] == entry["learning_rate"]
        assert entry["lr/adamw"] == pytest.approx(entry["lr/muon"] / 4)
        assert entry["lr/muon_effective_min"] == pytest.approx(entry["lr/muon"] * min(scales))
        assert entry["lr/muon_effective_max"] == pytest.approx(entry["lr/muon"] * max(scales))
        assert entry["optim/skipped_steps"] == 0
        assert entry["optim/ns_ms"] >= 0
    assert max(entry["lr/muon"] for entry in log) == RATES["lr"]


def test_a_factory_without_a_rate_says_where_to_put_it(tmp_path):
    """The Trainer hands it the model alone, so that args.learning_rate is nowhere to be seen."""
    from transformers import Trainer, TrainingArguments

    with alone():
        arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-3, use_cpu=True, report_to="none")
        given = {"adjust_lr_fn": "match_rms_adamw"}
        trainer = Trainer(small_model(), arguments, optimizer_cls_and_kwargs=(MuonFactory, given))
        with pytest.raises(ValueError, match=r'"lr": args\.learning_rate'):
            trainer.create_optimizer()
        given["lr"] = arguments.learning_rate
        assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {3e-3}


def test_the_plain_class_says_what_to_do(tmp_path):
    """The Trainer gives it groups of bare parameters."""
    from transformers import Trainer, TrainingArguments

    with alone():
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        trainer = Trainer(small_model(), arguments, optimizer_cls_and_kwargs=(distmuon.Muon, dict(RATES)))
        with pytest.raises(ValueError, match="bare parameters"):
            trainer.create_optimizer()


def test_metrics_of_a_wrapped_optimizer():
    model = small_model()
    optimizer = distmuon.wrap(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
    callback, state, logs = MuonMetrics(), TrainerState(log_history=[{}]), {"loss": 1.0}
    callback.on_optimizer_step(None, state, None, optimizer=optimizer)
    callback.on_log(None, state, None, logs, optimizer=optimizer)
    assert logs["lr/muon"] == state.log_history[0]["lr/muon"] == 2e-3 and "lr/muon_effective_max" in logs
