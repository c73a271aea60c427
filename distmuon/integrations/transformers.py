"""For the Trainer of transformers: a factory that it calls with the model, and a callback that logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distmuon.comm.group import default_group, distributed
from distmuon.groups import group_names
from distmuon.matrices import blocks_in
from distmuon.muon import Muon
from distmuon.numerics.update import lr_scale
from distmuon.wrapped import WrappedMuon


class MuonFactory:
    """Makes the optimizer of a Trainer, which hands the model to what is no optimizer class.

    An optimizer class gets groups of bare parameters from it, in which nobody could tell a matrix from an embedding::

        Trainer(model, args, optimizer_cls_and_kwargs=(MuonFactory, {"lr": 1e-3, "adjust_lr_fn": "match_rms_adamw"}))
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> Muon:
        """The optimizer of a model, before accelerate wraps or shards it.

        As with the Trainer's own optimizers, vectors and scalars (norms, biases) do not decay. Under DDP the
        processes share the work. The Trainer hands over the model alone: its ``learning_rate`` and ``weight_decay`` are
        not seen here.

        Args:
            model: Its parameters, trained or frozen.
            **kwargs: Of :class:`distmuon.Muon`, the rate among them.

        Raises:
            ValueError: without a rate, for which a default of this package would stand in unseen.
        """
        if "lr" not in kwargs:
            raise ValueError(
                "MuonFactory has no lr, and the Trainer does not hand its args.learning_rate to it: pass it in the "
                'pair, optimizer_cls_and_kwargs=(MuonFactory, {"lr": args.learning_rate, "adjust_lr_fn": '
                '"match_rms_adamw"}), with which one rate serves matrices and the rest.'
            )
        if distributed():
            kwargs.setdefault("mesh", default_group())
        optimizer = Muon(model, **kwargs)
        for group in list(optimizer.param_groups):
            if not group["use_muon"]:
                _split_off_vectors(optimizer, group)
        return optimizer


class MuonMetrics(TrainerCallback):
    """Adds what Muon measures to the logs of a Trainer.

    That is ``lr/muon`` and ``lr/adamw``, the learning rates; ``lr/muon_effective_{min,max}``, those of the matrices
    times the scale of their shapes; ``optim/skipped_steps``; and with ``step_stats=True`` the times and bytes of
    :meth:`distmuon.Muon.last_step_stats` on this process.

    The Trainer prints these and keeps them in ``log_history``. It calls the trackers of ``report_to`` first, so to have
    these there too, name them after this one::

        Trainer(model, TrainingArguments(..., report_to="none"), callbacks=[MuonMetrics(), TensorBoardCallback()])
    """

    def __init__(self) -> None:
        self._lrs: list[float | Tensor] = []

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rates of the step, which the schedule changes before the step is logged."""
        optimizer = _unwrapped(kwargs.get("optimizer"))
        if optimizer is not None:
            lrs = [group["lr"] for group in optimizer.param_groups]
            # schedulers write tensors in place
            self._lrs = [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the logs of a training step; those of evaluations stay as they are."""
        optimizer = _unwrapped(kwargs.get("optimizer"))
        if logs is not None and "loss" in logs and optimizer is not None:
            skipped = {"optim/skipped_steps": float(optimizer.skipped_steps)}
            found = {**_rates(optimizer, self._lrs), **skipped, **optimizer.last_step_stats()}
            logs.update(found)
            state.log_history[-1].update(found)


def _rates(optimizer: Muon, lrs: Sequence[float | Tensor]) -> dict[str, float]:
    """Learning rates of the groups, and of matrices by their shape."""
    rates: dict[str, float] = {}
    effective: list[float] = []
    for group, lr in zip(optimizer.param_groups, map(float, lrs), strict=False):
        rates.setdefault(f"lr/{'muon' if group['use_muon'] else group['lmo'] or 'adamw'}", lr)
        if group["use_muon"]:
            for name, param in zip(group_names(group, "group"), group["params"], strict=True):
                specs = [block.matrices for block in blocks_in(group, name, param)]
                effective += [lr * lr_scale(group["adjust_lr_fn"], *spec.logical) for spec in specs]
    if effective:
        rates |= {"lr/muon_effective_min": min(effective), "lr/muon_effective_max": max(effective)}
    return rates


def _split_off_vectors(optimizer: Muon, group: dict[str, Any]) -> None:
    """Move the vectors and scalars of an AdamW group to one that does not decay."""
    members = list(zip(group["param_names"], group["params"], strict=True))
    vectors = [member for member in members if member[1].ndim < 2]
    rest = [member for member in members if member[1].ndim >= 2]
    if not rest:
        group["weight_decay"] = 0.0
    elif vectors:
        group["param_names"], group["params"] = ([*column] for column in zip(*rest, strict=True))
        names, params = ([*column] for column in zip(*vectors, strict=True))
        changed = {"param_names": names, "params": params, "weight_decay": 0.0, "name": f"{group['name']}, no decay"}
        optimizer.param_groups.append({**group, **changed})


def _unwrapped(optimizer: Optimizer | None) -> Muon | None:
    """The optimizer inside accelerate's, if it is of this package; of a wrapped one the part for matrices."""
    while optimizer is not None and not isinstance(optimizer, Muon):
        inside = "muon" if isinstance(optimizer, WrappedMuon) else "optimizer"
        optimizer = getattr(optimizer, inside, None)
    return optimizer
