"""Config files and command lines: what they become, and the sentence for each mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distmuon.pretrain import load_config
from distmuon.pretrain.changes import check_changes, write_config
from distmuon.pretrain.config import validate
from distmuon.pretrain.errors import UserError
from distmuon.pretrain.model import model_config
from distmuon.pretrain.parse import parse_command

Tiny = Callable[..., Path]


def test_flags_override_the_file(tiny: Tiny) -> None:
    config = load_config(tiny(), "--optim.lr=0.5", "--model.config.hidden_size=64", "--optim.betas=[0.8,0.9]")
    assert (config.optim.lr, config.optim.warmup_steps) == (0.5, 2)
    assert config.model.config["hidden_size"] == 64
    assert config.model.config["num_hidden_layers"] == 1
    assert config.optim.betas == [0.8, 0.9]


def test_the_run_is_named_for_the_file(tiny: Tiny) -> None:
    assert load_config(tiny("some_name")).log.name == "some_name"
    assert load_config(tiny(), "--log.name=other").log.name == "other"


def test_a_written_config_reads_back_the_same(tiny: Tiny, tmp_path: Path) -> None:
    config = load_config(tiny(), "--optim.ns_coefficients=[3.0,-4.0,2.0]")
    write_config(tmp_path / "config.yaml", config, step=0)
    assert load_config(tmp_path / "config.yaml") == config


def test_a_changed_config_keeps_the_one_before(tiny: Tiny, tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", load_config(tiny()), step=0)
    write_config(tmp_path / "config.yaml", load_config(tiny(), "--optim.lr=1"), step=7)
    assert load_config(tmp_path / "config.yaml").optim.lr == 1
    assert load_config(tmp_path / "config-until-step-7.yaml").optim.lr == 3e-3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--optim.lrr 1", "--optim.lrr on the command line is no setting: did you mean --optim.lr?"),
        ("--lr 1", "--lr on the command line is no setting: did you mean --optim.lr?"),
        ("--optim.lr fast", "optim.lr is fast, and it takes a number: correct it (see --help)."),
        ("--optim.name sgd", "optim.name is sgd, and it takes muon or adamw: correct it (see --help)."),
        ("--train.compile maybe", "train.compile is maybe, and it takes true or false: correct it (see --help)."),
        ("--optim.lr=-1", "optim.lr is -1.0, and it must be at least 0: raise it."),
        ("--checkpoint.keep 0", "checkpoint.keep is 0, and it must be at least 1: raise it."),
        ("--optim.warmdown_ratio 2", "optim.warmdown_ratio is 2.0, and it is a part of a whole: "),
        ("--optim.betas [0.9,1.0]", "optim.betas is [0.9, 1.0], and it must be two numbers in [0, 1): "),
        ("--optim.ns_coefficients [1,2]", "optim.ns_coefficients has 2 numbers, and the iteration takes 3"),
        ("--train.tokens 512", "train.tokens is 512 and train.steps is 20, and exactly one says how long to train: "),
        ("--train.steps null", "train.tokens is None and train.steps is None, and exactly one"),
        ("--config nowhere.yaml", "--config nowhere.yaml cannot be read (No such file or directory): "),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tiny: Tiny, flags: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        validate(parse_command(["--config", str(tiny()), *flags.split(" ", 1)]).config)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {lrate: 1}", "optim.lrate in {path} is no setting: "),
        ("optimizer: {lr: 1}", "optimizer in {path} is no setting: did you mean optim?"),
        ("train: {warmup_steps: 1}", "train.warmup_steps in {path} is no setting: did you mean optim.warmup_steps?"),
        ("optim: muon", "optim in {path} is 'muon', and it is a section: "),
        ("- 1", "--config {path} holds a list, and it takes sections such as model and data."),
        ("optim: {lr: 1", "--config {path} is not YAML ("),
        ("optim: {lr: x}", "optim.lr is x, and it takes a number"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(sentence.format(path=path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__hiden_size": 8}, "did you mean hidden_size"),
        ({"model__type": "lama"}, "such as llama"),
        ({"model__max_position_embeddings": 16}, "raise max_position_embeddings to 32"),
    ],
)
def test_a_model_that_cannot_be_made(tiny: Tiny, changes: dict[str, object], words: str) -> None:
    config = load_config(tiny(**changes))
    with pytest.raises(UserError, match=words):
        model_config(config.model, vocab_size=257, sequence_length=32)


def test_the_context_grows_to_the_sequences_and_the_vocabulary_comes_from_the_data(tiny: Tiny) -> None:
    made = model_config(load_config(tiny()).model, vocab_size=257, sequence_length=5000)
    assert (made.max_position_embeddings, made.vocab_size) == (5000, 257)
    gpt2 = load_config(tiny(model__type="gpt2")).model
    gpt2.config = {"n_embd": 16, "n_head": 2, "n_layer": 1}
    assert model_config(gpt2, vocab_size=257, sequence_length=5000).n_positions == 5000


def test_only_changes_of_the_result_are_told(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_config(tmp_path / "config.yaml", load_config(tiny()), step=0)
    check_changes(tmp_path / "config.yaml", load_config(tiny(), "--log.every=7", "--train.eval_every=2"))
    assert not caplog.records
    check_changes(tmp_path / "config.yaml", load_config(tiny(), "--optim.lr=1", "--data.seed=5"))
    assert "data.seed 0 -> 5, optim.lr 0.003 -> 1.0" in caplog.text


@pytest.mark.parametrize(
    "flag", ["--model.config.hidden_size=32", "--model.config.mlp_bias=true", "--optim.name=adamw"]
)
def test_another_model_or_optimizer_cannot_go_on(tiny: Tiny, tmp_path: Path, flag: str) -> None:
    write_config(tmp_path / "config.yaml", load_config(tiny()), step=0)
    with pytest.raises(UserError, match="start a new run without --resume"):
        check_changes(tmp_path / "config.yaml", load_config(tiny(), flag))
