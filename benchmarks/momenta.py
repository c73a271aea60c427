"""Saves the momenta of a pretraining run: matrices that orthogonalization meets in earnest, far from Gaussian.

    python benchmarks/momenta.py                                     # configs/debug.yaml, whole
    python benchmarks/momenta.py --width 768 --layers 1 --steps 10 60 --batch 1024 --out runs/momenta_768.safetensors

The trainer of the project runs in this process, and after the given steps the momentum buffers of all matrices that
Muon updates go into one safetensors file, in float32, under names like ``step60/model.layers.0.mlp.up_proj.weight``.
``benchmarks/accuracy.py --momenta FILE`` and ``benchmarks/orthogonalize.py --momenta FILE`` read it.

``--width`` makes the model as wide as that and ends the run at the last of the steps; the learning rates up to there
are those of a longer run, as the schedule keeps the length of the config.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

import distmuon
from distmuon.pretrain import Config, load_config, train

ROOT = pathlib.Path(__file__).parent.parent


class _EnoughError(Exception):
    """The last of the steps was taken."""


def collect(config: Config, steps: Sequence[int | None]) -> dict[str, Tensor]:
    """Run the trainer and copy the momentum buffers after some steps.

    Args:
        config: Of the run; its optimizer is Muon. The run folder is a temporary one.
        steps: Numbers of steps, None for the last one of the run.

    Returns:
        Float32 copies by ``step{number}/{parameter}``. Stacks of matrices stay stacks.

    Raises:
        ValueError: if the run has no such step, or its optimizer is not Muon.
    """
    if config.optim.name != "muon":
        raise ValueError(f"optim.name={config.optim.name!r} has no momentum of Muon: take a config with muon.")
    found: dict[str, Tensor] = {}
    last = config.train.steps
    if last is None and (None in steps):
        raise ValueError("train.steps is not set, so the last step is not known: set it in the config.")
    wanted = {last if step is None else step for step in steps}
    taken = 0

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal taken
        if not isinstance(optimizer, distmuon.Muon):
            return
        taken += 1
        if taken in wanted:
            found.update({f"step{taken}/{name}": value for name, value in momentum_buffers(optimizer).items()})
        if taken == max(number for number in wanted if number is not None):
            raise _EnoughError

    handle = register_optimizer_step_post_hook(after_step)
    try:
        with tempfile.TemporaryDirectory() as folder:
            log = dataclasses.replace(config.log, dir=folder, name="momenta", plot=False)
            checkpoint = dataclasses.replace(config.checkpoint, every=0)
            train(dataclasses.replace(config, log=log, checkpoint=checkpoint))
    except _EnoughError:
        pass
    finally:
        handle.remove()
    missing = sorted(number for number in wanted if number is not None and number > taken)
    if missing:
        raise ValueError(f"steps={missing} are beyond the run, which ended after {taken}: ask for earlier ones.")
    return found


def momentum_buffers(optimizer: distmuon.Muon) -> dict[str, Tensor]:
    """Float32 copies of the momentum of every matrix, by parameter name; the step was taken at least once."""
    params = (param for group in optimizer.param_groups for param in group["params"])
    rows = optimizer.report().rows
    return {
        row.name: optimizer.state[param]["momentum_buffer"].detach().float().clone().contiguous()
        for row, param in zip(rows, params, strict=True)
        if row.algorithm == "muon"
    }


def widened(config: Config, width: int, layers: int) -> Config:
    """The config with a model of another width: heads of 64, and feed-forward matrices of four times the width."""
    model = {
        **config.model.config,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 64),
    }
    return dataclasses.replace(config, model=dataclasses.replace(config.model, config=model))


def main() -> None:
    """Parse the command line, run and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "configs/debug.yaml")
    parser.add_argument("--steps", nargs="+", default=["10", "60", "end"], help="after which steps; 'end': the last")
    parser.add_argument("--width", type=int, help="of another model than that of the config")
    parser.add_argument("--layers", type=int, default=1, help="with --width")
    parser.add_argument("--batch", type=int, help="tokens of a step instead of those of the config")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs/momenta.safetensors")
    args = parser.parse_args()
    overrides = ["--train.eval_every=0", "--train.eval_tokens=2048", "--train.sample_tokens=0", "--log.every=10"]
    if args.batch is not None:
        overrides.append(f"--train.global_batch_tokens={args.batch}")
        overrides.append(f"--train.device_batch={max(1, args.batch // 128)}")
    config = load_config(str(args.config), *overrides)
    if args.width is not None:
        config = widened(config, args.width, args.layers)
    found = collect(config, [None if step == "end" else int(step) for step in args.steps])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, args.out, metadata={"config": args.config.name, "torch": torch.__version__})
    shapes = sorted({tuple(value.shape) for value in found.values()})
    size = args.out.stat().st_size / 1e6
    print(f"{len(found)} matrices of {', '.join(f'{r} x {c}' for r, c in shapes)}, {size:.1f} MB: {args.out}")


if __name__ == "__main__":
    main()
