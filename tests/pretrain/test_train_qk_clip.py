"""QK-Clip and the Muon family by settings of the ``optim`` section."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_runs
from harness import Pool
from test_ranks_layouts import EXACT, LAYOUTS_OF_2, LAYOUTS_OF_4, compare, name_of
from test_ranks_resume import run
from test_train_resume import assert_same_state, computed, run_in_two

import distmuon
from distmuon.pretrain import UserError, load_config, train
from distmuon.pretrain.config import validate
from distmuon.pretrain.metrics import read_metrics
from distmuon.pretrain.model import build_model, model_config
from distmuon.pretrain.optimizer import build_optimizer
from distmuon.values import FAMILY_DEFAULTS

Tiny = Callable[..., Path]
MAX, CLIPPED = "qk_clip/max_logit", "qk_clip/clipped_heads"
# large weights, so that logits are; one head, of which the metrics tell all
ONE_HEAD = {
    "model__num_attention_heads": 1,
    "model__num_key_value_heads": 1,
    "model__initializer_range": 0.5,
    "checkpoint__every": 0,
}
TWO_LAYERS = {
    "model__num_hidden_layers": 2,
    "model__initializer_range": 0.4,
    "train__steps": 6,
    "train__device_batch": 2,
    "train__eval_tokens": 128,
    "optim__qk_clip": 2.0,
}


def of_steps(run_dir: str, *names: str) -> list[list[Any]]:
    return [[record.get(name) for name in names] for record in read_metrics(Path(run_dir) / "metrics.jsonl")]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_logits_are_those_of_weights_that_were_scaled(tiny: Tiny, optimizer: str, every: int) -> None:
    """Without a learning rate the clip alone changes weights, and the next logits tell by how much."""
    flags = [f"--optim.name={optimizer}", "--optim.lr=0", "--train.steps=8"]
    path = tiny(**ONE_HEAD)
    never = of_steps(train(load_config(path, *flags, "--optim.qk_clip=1e9")).run_dir, MAX, CLIPPED)
    assert {clipped for _, clipped in never} == {0.0}
    tau = 0.9 * never[0][0]
    settings = [f"--optim.qk_clip={tau}", f"--optim.qk_clip_every={every}"]
    found = of_steps(train(load_config(path, *flags, *settings)).run_dir, MAX, CLIPPED)
    factor, expected, clips = 1.0, [0.0], 0
    for number, (largest, clipped) in enumerate(found):
        if number % every == 0:
            expected.append(factor * never[number][0])
            factor *= min(1.0, tau / expected[-1])
        assert largest == pytest.approx(expected[-1], rel=1e-5)  # of the last step that was recorded
        # a batch that comes again has its largest logit on the bound
        assert clipped == float(expected[-1] > tau) or largest == pytest.approx(tau, rel=1e-5)
        clips += expected[-1] > 1.01 * tau
    assert 0 < clips < len(found)


def test_without_the_setting_nothing_is_recorded(tiny: Tiny) -> None:
    summary = train(load_config(tiny(train__steps=2, **ONE_HEAD)))
    assert of_steps(summary.run_dir, MAX, CLIPPED) == [[None, None]] * 2


def test_accumulation_and_recomputation_clip_alike(tiny: Tiny) -> None:
    changes = {**ONE_HEAD, "train__steps": 4, "optim__qk_clip": 1.0, "optim__name": "adamw"}
    whole = train(load_config(tiny("whole", **changes)))
    parts = train(load_config(tiny("parts", train__device_batch=2, train__activation_checkpointing=True, **changes)))
    for (one, clipped), (other, same) in zip(
        of_steps(whole.run_dir, MAX, CLIPPED), of_steps(parts.run_dir, MAX, CLIPPED), strict=True
    ):
        assert clipped == same
        assert one == pytest.approx(other, rel=1e-4)
    assert of_steps(whole.run_dir, CLIPPED)[0] == [1.0]


@pytest.mark.parametrize("every", [1, 3])
def test_resume_is_exact(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    changes = {"model__initializer_range": 0.5, "optim__qk_clip": 1.0, "optim__qk_clip_every": every}
    whole = train(load_config(tiny("whole", **changes)))
    parts = run_in_two(tiny("parts", **changes), monkeypatch, 11)
    assert computed(parts.run_dir) == computed(whole.run_dir)
    assert_same_state(parts, whole)
    before, after = (of_steps(done.run_dir, MAX, CLIPPED) for done in (whole, parts))
    assert before[0][1] > 0
    # the first recorded step after the 11 that were done is the 12th or 13th
    first = 11 + (-11) % every
    assert after[:11] == before[:11] and after[first:] == before[first:]
    assert after[11:first] == [[None, None]] * (first - 11)


@pytest.mark.parametrize("layout", LAYOUTS_OF_2, ids=name_of)
def test_two_ranks_clip_as_one(tiny: Tiny, two: Pool, layout: dict[str, int]) -> None:
    clip_as_one(tiny, two, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS_OF_4, ids=name_of)
def test_four_ranks_clip_as_one(tiny: Tiny, four: Pool, layout: dict[str, int]) -> None:
    clip_as_one(tiny, four, layout)


def clip_as_one(tiny: Tiny, pool: Pool, layout: dict[str, int]) -> None:
    path, flags = tiny(**TWO_LAYERS, checkpoint__every=0), ["--optim.name=adamw"]
    compare(pool, path, layout, flags, EXACT)
    runs = sorted(Path(load_config(path).log.dir).iterdir())
    assert len(runs) == 2
    one, several = (of_steps(str(folder), MAX, CLIPPED) for folder in runs)
    assert max(clipped for _, clipped in one) > 1
    for (largest, clipped), (same, as_many) in zip(one, several, strict=True):
        assert largest == pytest.approx(same, rel=1e-5)
        assert clipped == as_many


def test_resume_is_exact_where_parameters_are_sharded(tiny: Tiny, two: Pool) -> None:
    changes = {**TWO_LAYERS, "train__steps": 8, "optim__qk_clip_every": 3}
    whole = run(two, "fsdp", tiny("whole", **changes), [])
    two.run(rank_runs.run_with_signal, tiny("parts", **changes), ["--parallel.dp_shard=2"], 1, 5, timeout=120.0)
    parts = run(two, "fsdp", tiny("parts", **changes), [], "auto")
    assert (parts.losses, parts.norms, parts.validation) == (whole.losses, whole.norms, whole.validation)
    assert [record[MAX] for record in parts.records[6:]] == [record[MAX] for record in whole.records[6:]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__qk_clip": 0.0}, "optim.qk_clip is 0, and it is a bound of logits"),
        ({"optim__qk_clip": math.inf}, "optim.qk_clip is inf, "),
        ({"optim__qk_clip": 100.0, "optim__qk_clip_every": 0}, "optim.qk_clip_every is 0, and it must be at least 1"),
        ({"optim__qk_clip": 100.0, "model__type": "qwen3"}, "optim.qk_clip is 100, and 'model.layers.0.self_attn'"),
        ({"optim__block_period": 2}, "the optimizer refuses the optim section: "),
        ({"optim__block_period": 0}, "optim.block_period is 0, and it must be at least 1"),
        ({"optim__muon_beta2": 1.0}, "muon_beta2=1.0"),
    ],
)
def test_what_cannot_work_is_a_sentence(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        train(load_config(tiny(**changes)))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_settings_of_the_family_reach_the_groups(tiny: Tiny) -> None:
    other = {
        "variant": "normuon",
        "muon_beta2": 0.9,
        "cautious_wd": True,
        "block_period": 5,
        "blocks": 2,
        "block_lr_ratio": 0.5,
    }
    assert other.keys() == FAMILY_DEFAULTS.keys()
    for settings in (FAMILY_DEFAULTS, other):
        config = load_config(tiny(**{f"optim__{key}": value for key, value in settings.items()}))
        validate(config)
        model = build_model(model_config(config.model, 300, 32), seed=0)
        optimizer = build_optimizer(model, config.optim)
        assert isinstance(optimizer, distmuon.Muon)
        on_muon = [group for group in optimizer.param_groups if group["use_muon"]]
        assert [{key: group[key] for key in settings} for group in on_muon] == [settings] * len(on_muon)
    assert {key: getattr(load_config(tiny()).optim, key) for key in other} == FAMILY_DEFAULTS
