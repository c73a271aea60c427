"""The model of a run for transformers: the weights of its checkpoint, bit for bit, from any layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_runs
import torch
import torch.distributed.checkpoint as dcp
import yaml
from harness import Pool
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from distmuon import cli
from distmuon.pretrain import UserError, load_config, train
from distmuon.pretrain.data import ByteTokenizer
from distmuon.pretrain.export import export
from distmuon.pretrain.export_tokenizer import SEPARATOR, byte_tokenizer

Tiny = Callable[..., Path]
SHORT = {"train__steps": 4, "train__eval_every": 0, "train__eval_tokens": 128, "checkpoint__every": 2}


def saved_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by what its index lists, without a model."""
    index = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    weights = {key: torch.empty(entry.size) for key, entry in index.items() if key.startswith("app.model.")}
    dcp.load(weights, checkpoint_id=checkpoint, no_dist=True)
    return {key.removeprefix("app.model."): value for key, value in weights.items()}


def logits_of(model: torch.nn.Module) -> Tensor:
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.fixture
def run(tiny: Tiny) -> Path:
    """A run of one process with checkpoints at steps 2 and 4."""
    return Path(train(load_config(tiny(**SHORT))).run_dir)


@pytest.mark.parametrize("layout", ["one", "fsdp", "tp"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_logits_are_those_of_the_checkpoint(
    tiny: Tiny, two: Pool, tmp_path: Path, layout: str, tied: bool
) -> None:
    path = tiny(**SHORT, model__tie_word_embeddings=tied, train__device_batch=4)
    flags = {"one": [], "fsdp": ["--parallel.dp_shard=2"], "tp": ["--parallel.tp=2"]}[layout]
    if layout == "one":
        folder = rank_runs.run(path).folder
    else:
        folder = two.run(rank_runs.run, path, flags, timeout=120.0)[0].folder
    done = export(folder, tmp_path / "model")
    assert (done.checkpoint.name, done.dtype) == ("step-4", torch.float32)

    weights = saved_weights(Path(folder) / "checkpoints" / "step-4")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert written.keys() == weights.keys() - ({"lm_head.weight"} if tied else set())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = model.state_dict()
    assert loaded.keys() == {*weights, "lm_head.weight"}
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    plain = AutoConfig.from_pretrained(tmp_path / "model")
    reference = AutoModelForCausalLM.from_config(plain)
    reference.load_state_dict(weights, strict=not tied)
    assert torch.equal(logits_of(model), logits_of(reference))
    assert done.parameters == sum(parameter.numel() for parameter in model.parameters())
    # training moved them, so an untrained model would have been seen
    assert not torch.equal(loaded["model.layers.0.mlp.up_proj.weight"], _drawn(folder, plain))


def _drawn(folder: str, config: AutoConfig) -> Tensor:
    torch.manual_seed(load_config(Path(folder) / "config.yaml").train.seed)
    return AutoModelForCausalLM.from_config(config).state_dict()["model.layers.0.mlp.up_proj.weight"]


def test_bfloat16_and_an_older_step(run: Path, tmp_path: Path) -> None:
    done = export(run / "checkpoints" / "step-2", tmp_path / "model", dtype="bfloat16")
    assert (done.checkpoint.name, done.dtype) == ("step-2", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in saved_weights(run / "checkpoints" / "step-2").items():
        assert model.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(model.state_dict()[name], weight.to(torch.bfloat16)), name


def test_what_is_beside_the_weights(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.use_cache
    assert (config.bos_token_id, config.eos_token_id) == (256, 256)
    text = (Path(__file__).parents[2] / "docs" / "convert.md").read_text(encoding="utf-8")
    shown = text.split("```python\n")[2].split("```")[0]
    known: dict[str, Any] = {}
    exec(shown.replace("models/debug", str(tmp_path / "model")), known)
    model, tokenizer = known["model"], known["tokenizer"]
    ids = tokenizer("abc", return_tensors="pt").input_ids
    assert ids.tolist() == [[97, 98, 99]]
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 3


@settings(max_examples=50)
@given(st.text())
def test_the_tokenizer_of_bytes_has_the_ids_of_the_run(text: str) -> None:
    ours, theirs = ByteTokenizer(), byte_tokenizer()
    # a surrogate is no text to either, and the separator's name is a token there
    text = text.encode("utf-8", errors="replace").decode().replace(SEPARATOR, "")
    ids = ours.encode(text).tolist()
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.convert_tokens_to_ids(SEPARATOR) == ours.separator
    assert len(theirs) == ours.vocab_size


def test_the_settings_that_a_run_was_given_stay(tiny: Tiny, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    source = yaml.safe_load(tiny().read_text(encoding="utf-8"))["data"]["source"]
    assert cli.main(["tokenize", str(shards), "--source", source]) == 0
    (shards / "metadata.json").unlink()
    path = tiny(**SHORT, data__source=str(shards), model__eos_token_id=7, model__use_cache=False)
    folder = Path(train(load_config(path)).run_dir)
    done = export(folder, tmp_path / "model")
    assert done.tokenizer == "no tokenizer (the shards do not say it)"
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.bos_token_id, config.eos_token_id, config.use_cache) == (None, 7, False)
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    shutil.rmtree(shards)
    assert "names no file" in export(folder, tmp_path / "other").tokenizer


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "models" / "tiny"
    assert cli.main(["export", str(run), "--to", str(out), "--dtype", "bfloat16"]) == 0
    assert f"wrote {out}: " in capsys.readouterr().out
    assert cli.main(["export", str(run), "--to", str(out)]) == 1
    assert "is not empty: give another folder, or --overwrite" in capsys.readouterr().err
    (out / "leftover.json").write_text("x")
    assert cli.main(["export", str(run), "--to", str(out), "--overwrite"]) == 0
    assert not (out / "leftover.json").exists()
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    assert cli.main(["export", str(run)]) == 2
    assert cli.main(["export", str(run), "--to", str(out), "--dtype", "int8"]) == 2
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_what_cannot_be_exported_is_told(run: Path, tmp_path: Path) -> None:
    def refuses(message: str, source: Path = run, to: Path = tmp_path / "model", **options: bool | str) -> None:
        with pytest.raises(UserError, match=message):
            export(source, to, **options)  # type: ignore[arg-type]
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    refuses("dtype is 'int8', and models are exported as float32 or bfloat16", dtype="int8")
    refuses("holds no checkpoint .a step-N folder.", source=other)
    refuses("is not empty", to=other)
    refuses("holds other things than a model", to=other, overwrite=True)
    (other / "config.json").write_text("{}")
    refuses("holds other things than a model .thesis.tex.", to=other, overwrite=True)
    refuses("is a file", to=other / "thesis.tex")
    refuses("would replace or mix with the run", to=run, overwrite=True)
    refuses("would replace or mix with the run", to=run.parent, overwrite=True)
    refuses("would replace or mix with the run", to=run / "checkpoints" / "model")
    refuses("cannot be written", to=other / "thesis.tex" / "model")
    lone = tmp_path / "lone" / "checkpoints" / "step-4"
    shutil.copytree(run / "checkpoints" / "step-4", lone)
    refuses("config.yaml is missing", source=lone)
    tree = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    tree["model"]["config"]["hidden_size"] = 32
    (lone.parents[1] / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    refuses("does not fill the model of its config.yaml", source=lone)
    del tree["model"]["config"]["vocab_size"]
    (lone.parents[1] / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    refuses("lacks model.config.vocab_size", source=lone)
    shard = next(lone.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    refuses("is broken .__0_0.distcp has another checksum", source=lone)
    assert not (tmp_path / "model").exists()
    assert (other / "thesis.tex").read_text() == "years"


def test_a_full_disk_leaves_what_was_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distmuon.pretrain.export_tokenizer.SavedTokenizer.save", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device."):
        export(run, tmp_path / "model", dtype="bfloat16", overwrite=True)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
