"""Further optimizers of other projects, in our words, for tests of migration; see convert_sources.py for the rest.

Formulas were read in the sources named at each class. Newton-Schulz runs in the dtype of the momentum rather than in
bfloat16, so that equality shows to more digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from convert_sources import QUINTIC, Base, KellerJordanSingle, adam_direction, polar
from torch import Tensor

# emerging_optimizers/orthogonalized_optimizers/muon_utils.py 33-42, its "quintic"; its "simple" is Jordan's
FIVE = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def adamw(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """AdamW with decoupled decay, its state made when it is missing."""
    if not state:
        state.update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param), step=0)
    state["step"] += 1
    param.mul_(1 - group["lr"] * group["weight_decay"])
    moments = state["exp_avg"], state["exp_avg_sq"]
    param.sub_(group["lr"] * adam_direction(grad, *moments, state["step"], group["betas"], group["eps"]))


class MuonFsdp2Package(Base):
    """``muon-fsdp2`` 0.3.0 of PyPI, muon_fsdp2.py 57-78 and 154-157: averages, with ``rms_scale`` by default."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        muon = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "rms_scale": True, "nesterov": True, "ns_steps": 5}
        rest = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        super().__init__([{**(muon if group["use_muon"] else rest), **group} for group in groups], {})

    def update(self, param, grad, state, group):  # type: ignore[no-untyped-def]
        if not group["use_muon"]:
            return adamw(param, grad, state, group)
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(param))
        momentum.lerp_(grad, 1 - group["momentum"])
        blended = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        rows, cols = param.shape
        scale = 0.2 * math.sqrt(max(rows, cols)) if group["rms_scale"] else math.sqrt(max(1, rows / cols))
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.sub_(group["lr"] * scale * polar(blended, [QUINTIC] * group["ns_steps"], eps=1e-7))


class DeepSpeed(KellerJordanSingle):
    """DeepSpeed 0.19.8: deepspeed/runtime/zero/muon/original_muon.py 208-263 and muon_optimizer.py 57-127.

    Jordan's update. Names of its config: engine.py 2411-2473. ``per_head`` names how many heads a matrix has.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], config: dict[str, Any]) -> None:
        muon = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
        adam = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        halves = []
        for use_muon, defaults, own in ((True, muon, "muon_lr"), (False, adam, "adam_lr")):
            settings = {**defaults, **{key: config[key] for key in defaults if key in config}}
            settings["lr"] = config.get(own, settings["lr"])
            members = [param for name, param in named if self.on_muon(name, param) is use_muon]
            halves.append({"params": members, "use_muon": use_muon, **settings})
        super().__init__(halves)

    @staticmethod
    def on_muon(name: str, param: Tensor) -> bool:
        """deepspeed/__init__.py 370: by axes and name alone."""
        return param.ndim >= 2 and not any(word in name.lower() for word in ("embed", "lm_head"))


class Megatron(Base):
    """Megatron-LM (megatron-core 0.16.1 core/optimizer/muon.py) with Emerging-Optimizers 0.3.0 below it.

    Decay, average and Nesterov: orthogonalized_optimizer.py 155-184; scales: muon.py 138-160; ``split_qkv``: muon.py of
    Megatron 140-165; no decay of biases and other vectors: core/optimizer/__init__.py.
    """

    def __init__(
        self, muon: Sequence[Tensor], rest: Sequence[Tensor], qkv: Sequence[Tensor] = (), **given: Any
    ) -> None:
        settings = {"lr": 3e-4, "momentum": 0.95, "weight_decay": 0.01, "nesterov": False, "scale_mode": "spectral"}
        settings |= {"extra_scale_factor": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "qkv_shapes": None, **given}
        self.qkv = qkv
        adam = [{"params": [param], "weight_decay": settings["weight_decay"] * (param.ndim > 1)} for param in rest]
        groups = [{"params": list(muon), "use_muon": True}, *({**group, "use_muon": False} for group in adam)]
        super().__init__([group for group in groups if group["params"]], settings)

    def update(self, param, grad, state, group):  # type: ignore[no-untyped-def]
        if not group["use_muon"]:
            return adamw(param, grad, state, group)
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(param))
        param.mul_(1 - group["lr"] * group["weight_decay"])
        momentum.lerp_(grad, 1 - group["momentum"])
        blended = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        if any(param is one for one in self.qkv):
            # of each query group its queries, its keys and its values: all queries are one matrix, and so on
            grouped = blended.view(-1, sum(group["qkv_shapes"]), param.size(1))
            parts = [part.reshape(-1, param.size(1)) for part in grouped.split(group["qkv_shapes"], dim=1)]
            steps = [self.scaled(part, group).view(len(grouped), -1, param.size(1)) for part in parts]
            param.sub_(group["lr"] * torch.cat(steps, dim=1).view_as(param))
        else:
            param.sub_(group["lr"] * self.scaled(blended, group))

    @staticmethod
    def scaled(matrix: Tensor, group: dict[str, Any]) -> Tensor:
        rows, cols = matrix.shape
        scales = {"shape_scaling": max(1, rows / cols), "spectral": max(rows, cols), "unit_rms_norm": rows / cols}
        # the norm is divided by, and 1e-7 only its least value; matrices here are far above it
        direction = polar(matrix, FIVE, eps=0.0)
        return math.sqrt(scales[group["scale_mode"]]) * group["extra_scale_factor"] * direction
