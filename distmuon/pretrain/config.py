"""Every setting of a pretraining run, as dataclasses; ``parse.py`` fills them from YAML and flags."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from distmuon.pretrain.data import DataConfig
from distmuon.pretrain.errors import UserError


@dataclass
class ModelConfig:
    """The model: any causal language model of transformers, made with random weights.

    Attributes:
        type: Name that ``transformers.AutoConfig.for_model`` knows, such as llama, qwen3, gpt2 or olmo2.
        config: Arguments of that configuration, such as hidden_size. vocab_size comes from the data
            when it is absent, and the context length is raised to data.sequence_length.
    """

    type: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimConfig:
    """The optimizer and its learning rate schedule.

    Attributes:
        name: muon (with AdamW for embeddings, head and vectors) or adamw for everything.
        lr: Peak learning rate.
        adamw_lr: Peak learning rate of the parameters that AdamW updates under muon; null: lr.
        weight_decay: Decoupled weight decay.
        momentum: Momentum of Muon.
        nesterov: Whether Muon's momentum is Nesterov's.
        ns_steps: Number of Newton-Schulz iterations; null: as many as the coefficients have.
        ns_coefficients: Three numbers a, b, c of the iteration, or the name of a set; null: those of the engine.
        ns_engine: What orthogonalizes; auto: the fastest for each shape on this device.
        cost_table: File of `distmuon calibrate` that auto goes by; null: the built-in table.
        teams: Whether several ranks may own a matrix together where the cost table says that it pays.
        matrices: Which matrices weights hold (docs/matrices.md): auto takes apart what modules fuse, heads attention
            heads too, or group keys by globs of names; null: each weight is one matrix.
        variant: muon, normuon (rows of one size) or adamuon (elements over the root of their second moment): see
            docs/family.md, as for the next five.
        muon_beta2: Averaging coefficient of the second moments of normuon and adamuon.
        cautious_wd: Decay only the weights that the step makes smaller.
        block_period: Orthogonalize whole matrices in every so many steps, and blocks of them in those between.
        blocks: Parts of the rows of a matrix; as many as parallel.dp_shard are those that processes store.
        block_lr_ratio: Learning rate of the steps between over lr.
        qk_clip: Bound of attention logits, above which heads are scaled after the step (docs/qk_clip.md), such as 100;
            null: off. With either optimizer.
        qk_clip_every: Record logits and clip in every so many steps.
        ns_dtype: Precision of the iteration; float32 makes runs on other numbers of processes agree far closer, as
            rounding of summed gradients is not amplified by bfloat16.
        on_nonfinite: What NaN or an infinity in a gradient does under muon: raise ends the run with the name of the
            parameter, skip leaves the step out and counts it; both before anything is updated. null: nobody looks.
        verify_exchange: For debugging: compare checksums of what matrices and updates send between processes.
        adjust_lr_fn: How Muon's step is scaled to a matrix's shape: match_rms_adamw lets Muon use
            AdamW's learning rates; original is Jordan's; spectral and none are told in docs/learning_rates.md.
        betas: Averaging coefficients of AdamW.
        eps: Term added to AdamW's denominator.
        grad_clip: Largest global gradient norm; 0: off.
        schedule: wsd (warm up, hold, go down linearly), cosine or constant.
        warmup_steps: Steps of linear warm-up.
        warmdown_ratio: Part of all steps, at the end, over which wsd goes down.
        final_lr_frac: Learning rate at the end as a part of the peak.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = 2e-3
    adamw_lr: float | None = None
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int | None = None
    ns_coefficients: str | list[float] | None = None
    ns_engine: Literal["auto", "standard", "composed", "gram", "rational", "gram_newton_schulz"] = "auto"
    cost_table: str | None = None
    teams: bool = True
    matrices: Literal["auto", "heads"] | dict[str, Any] | None = None
    variant: Literal["muon", "normuon", "adamuon"] = "muon"
    muon_beta2: float = 0.95
    cautious_wd: bool = False
    block_period: int = 1
    blocks: int | None = None
    block_lr_ratio: float = 1.0
    qk_clip: float | None = None
    qk_clip_every: int = 1
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    on_nonfinite: Literal["raise", "skip"] | None = "raise"
    verify_exchange: bool = False
    adjust_lr_fn: Literal["match_rms_adamw", "original", "spectral", "none"] = "match_rms_adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    grad_clip: float = 1.0
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 0
    warmdown_ratio: float = 0.2
    final_lr_frac: float = 0.0


@dataclass
class TrainConfig:
    """How long and how to train. Give tokens or steps.

    Attributes:
        tokens: Tokens to train on; rounded down to whole steps.
        steps: Optimizer steps to take.
        global_batch_tokens: Tokens in one optimizer step, over all devices.
        device_batch: Sequences in one forward pass of one device, or fewer where a device's part of the global
            batch has fewer; the rest is gradient accumulation.
        dtype: auto: bfloat16 autocast where the device multiplies it natively, else float32.
            Parameters and optimizer state are float32 always.
        device: auto, cpu, cuda, cuda:1, mps, ...; under torchrun each process takes the cuda device of its number.
        compile: Compile the model with torch.compile; block by block where it is sharded.
        activation_checkpointing: Recompute activations in the backward pass to save memory.
        deterministic: Ask torch for deterministic kernels; slower on CUDA, no change on a CPU.
        seed: Seed of the weights, of dropout and of the sample.
        threads: CPU threads of torch; null: torch's choice.
        eval_every: Steps between validations; 0: only at the end.
        eval_tokens: Validation tokens read each time; null: all of them.
        sample_tokens: Tokens of sample text made at the end; 0: none.
        sample_prompt: Text that the sample continues.
    """

    tokens: int | None = None
    steps: int | None = None
    global_batch_tokens: int = 524_288
    device_batch: int = 16
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    deterministic: bool = False
    seed: int = 0
    threads: int | None = None
    eval_every: int = 250
    eval_tokens: int | None = 1_048_576
    sample_tokens: int = 0
    sample_prompt: str = "\n"


@dataclass
class ParallelConfig:
    """How the processes of a run are arranged; the product is the number of processes.

    Attributes:
        dp_replicate: Copies of the model (DDP, or HSDP with the others); -1: whatever is left.
        dp_shard: Processes that share one copy's parameters, gradients and optimizer state (FSDP2); -1: whatever is
            left.
        tp: Processes that share each matrix product (tensor parallelism); -1: whatever is left.
        timeout_seconds: How long a process waits for the others in a collective before it takes one of them for
            stalled and ends; null: what torch takes, 30 minutes between CPUs and 10 between GPUs.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    timeout_seconds: float | None = None


@dataclass
class LogConfig:
    """Where and what a run reports.

    Attributes:
        dir: Folder of the run folders.
        name: Name of the run folder; null: that of the config file.
        every: Steps between lines of metrics.
        step_stats: Measure the phases of Muon's step and log them (optim/wire_ms, optim/bytes_sent, ...).
        tensorboard: Write TensorBoard events into the run folder too.
        progress: bar, lines or off; auto: a bar on a terminal, else lines.
        plot: Draw loss.png at the end.
    """

    dir: str = "runs"
    name: str | None = None
    every: int = 10
    step_stats: bool = False
    tensorboard: bool = False
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    plot: bool = True


@dataclass
class CheckpointConfig:
    """When the state of a run is saved.

    Attributes:
        every: Steps between checkpoints, one more at the end; 0: no checkpoints at all.
        keep: Newest checkpoints that are kept.
        async_save: Write checkpoints while training goes on, from a copy in host memory.
        verify: Compare all files of a checkpoint with the checksums that they were written with before a resume; sizes
            are compared always.
        routing_changes: What a resume does if another algorithm updates a parameter than the one that wrote the
            checkpoint; reset: start the optimizer state of such parameters anew.
    """

    every: int = 500
    keep: int = 2
    async_save: bool = True
    verify: bool = True
    routing_changes: Literal["error", "reset"] = "error"


@dataclass
class Config:
    """All settings of a run; each section is a group of keys in the YAML file.

    Attributes:
        model: The model.
        data: The corpus and its tokens.
        optim: The optimizer and its schedule.
        train: Length, batch and precision.
        parallel: Arrangement of processes.
        log: Run folder and metrics.
        checkpoint: Saving.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


# (key, smallest value); null passes
_AT_LEAST = (
    ("train.tokens", 1),
    ("train.steps", 1),
    ("train.global_batch_tokens", 1),
    ("train.device_batch", 1),
    ("train.threads", 1),
    ("train.eval_every", 0),
    ("train.eval_tokens", 1),
    ("train.sample_tokens", 0),
    ("optim.lr", 0),
    ("optim.adamw_lr", 0),
    ("optim.weight_decay", 0),
    ("optim.ns_steps", 1),
    ("optim.block_period", 1),
    ("optim.blocks", 1),
    ("optim.block_lr_ratio", 0),
    ("optim.qk_clip_every", 1),
    ("optim.grad_clip", 0),
    ("optim.warmup_steps", 0),
    ("log.every", 1),
    ("checkpoint.every", 0),
    ("checkpoint.keep", 1),
)


def validate(config: Config) -> None:
    """Check what needs no data, no model and no device.

    Raises:
        UserError: For the first value that cannot work, saying what would.
    """
    for key, least in _AT_LEAST:
        value = get(config, key)
        if value is not None and value < least:
            raise UserError(f"{key} is {value}, and it must be at least {least}: raise it.")
    timeout = config.parallel.timeout_seconds
    if timeout is not None and timeout <= 0:
        raise UserError(
            f"parallel.timeout_seconds is {timeout:g}, and a wait takes longer: give more, or null for torch's default."
        )
    train, optim = config.train, config.optim
    if (train.tokens is None) == (train.steps is None):
        way = "give one of them" if train.tokens is None else "set the other to null, as in --train.steps null"
        raise UserError(
            f"train.tokens is {train.tokens} and train.steps is {train.steps}, and exactly one says how long to "
            f"train: {way}."
        )
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"optim.betas is {optim.betas}, and it must be two numbers in [0, 1): try [0.9, 0.95].")
    for key in ("optim.warmdown_ratio", "optim.final_lr_frac"):
        value = get(config, key)
        if not 0 <= value <= 1:
            raise UserError(f"{key} is {value}, and it is a part of a whole: give a number from 0 to 1.")
    if optim.qk_clip is not None and not 0 < optim.qk_clip < math.inf:
        raise UserError(
            f"optim.qk_clip is {optim.qk_clip:g}, and it is a bound of logits: give a number such as 100, or null."
        )
    coefficients = optim.ns_coefficients
    if isinstance(coefficients, list) and len(coefficients) != 3:
        raise UserError(
            f"optim.ns_coefficients has {len(coefficients)} numbers, and the iteration takes 3 (a, b, c): "
            "give three, or null for the default."
        )


def get(config: Config, key: str) -> Any:
    """The value of a dotted key, such as ``"optim.lr"``."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
