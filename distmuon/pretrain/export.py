"""A checkpoint to a model folder of transformers: ``config.json``, safetensors and the tokenizer."""

from __future__ import annotations

import os
import pathlib
import secrets
import shutil
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from transformers import GenerationConfig, PretrainedConfig

from distmuon.pretrain.checkpoint import find_problem, step_folders, step_of
from distmuon.pretrain.checkpoint.manifest import read_manifest
from distmuon.pretrain.checkpoint.metadata import read_metadata
from distmuon.pretrain.checkpoint.names import FOLDER, run_folder, step_folder
from distmuon.pretrain.checkpoint.reader import Planner, Reader
from distmuon.pretrain.config import Config
from distmuon.pretrain.errors import UserError
from distmuon.pretrain.export_tokenizer import SavedTokenizer, find_tokenizer
from distmuon.pretrain.model import build_model, count_parameters, model_config
from distmuon.pretrain.parse import load_config

# of what transformers writes for a model and a tokenizer
_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".jinja"}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The folder.
        checkpoint: The ``step-N`` folder that it was made of.
        parameters: Trained values; tied weights count once.
        dtype: Theirs.
        tokenizer: What the tokenizer is, or why there is none.
    """

    path: pathlib.Path
    checkpoint: pathlib.Path
    parameters: int
    dtype: torch.dtype
    tokenizer: str


def export(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Exported:
    """Write the model of a run as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    One process does it on the CPU, whatever layout the run had. The folder is written under a temporary name beside
    ``to`` and renamed when it is whole.

    Args:
        source: A run folder, whose newest checkpoint is taken, or a ``step-N`` folder of one. Checksums are compared.
        to: The folder to make.
        dtype: ``"float32"``, in which runs keep their weights, or ``"bfloat16"``, to which they are rounded.
        overwrite: Replace a model that is there.

    Raises:
        UserError: If there is no whole checkpoint or no config, if ``to`` holds something, or the disk refuses it.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, and models are exported as {' or '.join(DTYPES)}: give one of them.")
    checkpoint = _find_checkpoint(pathlib.Path(source))
    run, target = _run_of(checkpoint), pathlib.Path(os.path.abspath(to))
    _check_target(target, run, overwrite)
    config = _read_config(run / "config.yaml")
    lm_config = model_config(config.model, config.model.config.get("vocab_size", 0), config.data.sequence_length)
    with torch.random.fork_rng(devices=[]):
        model = build_model(lm_config, seed=config.train.seed)
    _load_weights(checkpoint, model)
    model.to(DTYPES[dtype]).eval()
    tokenizer = find_tokenizer(config.data)
    _set_for_generation(model, config, tokenizer)
    _write(model, tokenizer, target)
    return Exported(target, checkpoint, count_parameters(model), DTYPES[dtype], tokenizer.description)


def _find_checkpoint(path: pathlib.Path) -> pathlib.Path:
    asked = step_folder(path)
    folders = [asked] if asked is not None else step_folders(path / FOLDER) or step_folders(path)
    if not folders:
        raise UserError(f"{path} holds no checkpoint (a step-N folder): give a run folder such as runs/debug.")
    newest = folders[-1].absolute()
    problem = find_problem(newest, hashes=True)
    if problem is not None:
        others = [folder for folder in step_folders(newest.parent) if folder.name != newest.name]
        advice = f"try {others[-1]}" if others else "there is no other in its folder"
        raise UserError(f"the checkpoint {newest} is broken ({problem}): {advice}.")
    return newest


def _run_of(checkpoint: pathlib.Path) -> pathlib.Path:
    folder = run_folder(checkpoint)
    path = (folder or checkpoint.parent.parent) / "config.yaml"
    if folder is None or not path.is_file():
        raise UserError(
            f"{path} is missing, and without the config of the run its model is not known: put a step-N folder into "
            "the checkpoints folder of its run."
        )
    return folder


def _read_config(path: pathlib.Path) -> Config:
    config = load_config(path)
    if "vocab_size" not in config.model.config:
        raise UserError(f"{path} lacks model.config.vocab_size, which every run writes: give the folder of a run.")
    return config


def _check_target(target: pathlib.Path, run: pathlib.Path, overwrite: bool) -> None:
    real = target.resolve()
    run = run.resolve()
    inside = {(run / FOLDER), (run / FOLDER).resolve()} & {real, *real.parents}
    if real in (run, *run.parents) or inside:
        raise UserError(f"the model would replace or mix with the run in {run}: export to a folder of its own.")
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file, and a model is a folder: give another name.")
    if any(target.iterdir()):
        if not overwrite:
            raise UserError(f"{target} is not empty: give another folder, or --overwrite to replace a model in it.")
        if not (target / "config.json").is_file():
            raise UserError(f"{target} holds other things than a model (no config.json): give another folder.")
        others = [path.name for path in sorted(target.iterdir()) if path.is_dir() or path.suffix not in _SUFFIXES]
        if others:
            raise UserError(f"{target} holds other things than a model ({others[0]}): give another folder, or move it.")


def _load_weights(checkpoint: pathlib.Path, model: nn.Module) -> None:
    """Fill a whole model from the checkpoint of any layout, without unpickling objects."""
    weights = get_model_state_dict(model)
    try:
        reader = Reader(checkpoint, read_metadata(checkpoint, read_manifest(checkpoint).files))
        with warnings.catch_warnings():
            # there is one process on purpose
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_load({"app": {"model": weights}}, storage_reader=reader, planner=Planner(), no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is no Exception; a misfit raises plain ones
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        raise UserError(
            f"the checkpoint {checkpoint} does not fill the model of its config.yaml ({reason}): restore the config of "
            "the run."
        ) from error


def _set_for_generation(model: nn.Module, config: Config, tokenizer: SavedTokenizer) -> None:
    """Settings that training had otherwise, or that the default of this kind of model says of another vocabulary."""
    lm_config: PretrainedConfig = model.config  # type: ignore[assignment]
    given: dict[str, Any] = config.model.config
    if "use_cache" not in given:
        lm_config.use_cache = True
    for key in ("bos_token_id", "eos_token_id"):
        if key not in given:
            # one token stands between documents
            setattr(lm_config, key, tokenizer.separator)
    generation = GenerationConfig.from_model_config(lm_config)
    model.generation_config = generation  # type: ignore[assignment]


def _write(model: nn.Module, tokenizer: SavedTokenizer, target: pathlib.Path) -> None:
    temporary = target.with_name(f".{target.name}.writing-{secrets.token_hex(4)}")
    aside = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    save: Any = model.save_pretrained
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        tokenizer.save(temporary)
        if target.exists():
            target.rename(aside)
        temporary.rename(target)
    except OSError as error:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}): free space or give a folder you may write to."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def describe(exported: Exported) -> str:
    """One line for the terminal."""
    dtype = str(exported.dtype).removeprefix("torch.")
    return (
        f"wrote {exported.path}: {exported.parameters:,} parameters in {dtype} of step {step_of(exported.checkpoint)}, "
        f"{exported.tokenizer}"
    )
