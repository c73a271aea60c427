"""Optimizers with the state, the groups and the arithmetic of other projects, in our words, for tests of conversion.

Each was written from the formulas and layouts that the files of ``distmuon/checkpoint/formats`` cite. Newton-Schulz
runs in the dtype of the momentum rather than in bfloat16, so that equality shows to more digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

QUINTIC = (3.4445, -4.7750, 2.0315)
# microsoft/dion, dion/polar_express.py 10-16
DION = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar(x: Tensor, stages: Sequence[Sequence[float]], *, eps: float, safety: float = 1.0) -> Tensor:
    """Odd polynomials of matrices ``(..., m, n)`` whose Frobenius norm is divided out first."""
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) * safety + eps)
    for a, b, c in stages:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def adam_direction(grad: Tensor, first: Tensor, second: Tensor, step: int, betas: Any, eps: float) -> Tensor:
    """Adam with eps added after the correction of bias, as torch and Keller Jordan do."""
    first.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    return (first / (1 - betas[0] ** step)) / ((second / (1 - betas[1] ** step)).sqrt() + eps)


class Base(Optimizer):
    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, param.grad.clone(), self.state[param], group)

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class KellerJordanSingle(Base):
    """SingleDeviceMuonWithAuxAdam: averages, ``use_muon`` in the group, integer steps."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    def update(self, param, grad, state, group):  # type: ignore[no-untyped-def]
        param.mul_(1 - group["lr"] * group["weight_decay"])
        if not group["use_muon"]:
            if not state:
                state.update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param), step=0)
            state["step"] += 1
            moments = state["exp_avg"], state["exp_avg_sq"]
            param.sub_(group["lr"] * adam_direction(grad, *moments, state["step"], group["betas"], group["eps"]))
            return
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(param))
        momentum.lerp_(grad, 1 - group["momentum"])
        blended = grad.lerp(momentum, group["momentum"])
        matrices = blended.flatten(1) if param.ndim == 4 else blended
        scale = math.sqrt(max(1, param.size(-2) / param.size(-1)))
        param.sub_(group["lr"] * scale * polar(matrices, [QUINTIC] * 5, eps=1e-7).view_as(param))


class KellerJordan(KellerJordanSingle):
    """MuonWithAuxAdam of one rank: it sorts matrices by shape, and steps those of its rank alone."""

    def __init__(self, groups: Sequence[dict[str, Any]], *, rank: int = 0, world: int = 1) -> None:
        for group in groups:
            if group["use_muon"]:
                group["params"] = sorted(group["params"], key=lambda param: param.size(), reverse=True)
        super().__init__(groups)
        self.rank, self.world = rank, world

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            mine = group["params"][self.rank :: self.world] if group["use_muon"] else group["params"]
            for param in mine:
                self.update(param, param.grad.clone(), self.state[param], group)


class Moonlight(Base):
    """Sums, one group, ``use_muon`` in the state, eps of Adam added before the correction of bias."""

    scale = staticmethod(lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)))
    flag: type = bool

    def __init__(self, muon: Sequence[Tensor], adamw: Sequence[Tensor], **settings: Any) -> None:
        defaults = {"lr": 1e-3, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5}
        super().__init__([*muon, *adamw], {**defaults, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8, **settings})
        for param in (*muon, *adamw):
            self.state[param]["use_muon"] = self.flag(any(param is one for one in muon))

    def decay(self, group: dict[str, Any], *, matrix: bool) -> float:
        return group["wd"]

    def update(self, param, grad, state, group):  # type: ignore[no-untyped-def]
        lr = group["lr"]
        param.mul_(1 - lr * self.decay(group, matrix=bool(state["use_muon"])))
        if state["use_muon"]:
            flat = grad.flatten(1)
            total = state.setdefault("momentum_buffer", torch.zeros_like(flat))
            total.mul_(group["momentum"]).add_(flat)
            blended = flat + group["momentum"] * total if group["nesterov"] else total
            direction = polar(blended, [QUINTIC] * group["ns_steps"], eps=1e-7)
            param.sub_(lr * self.scale(*flat.shape) * direction.view_as(param))
            return
        if "step" not in state:
            state.update(step=0, moment1=torch.zeros_like(grad), moment2=torch.zeros_like(grad))
        state["step"] += 1
        beta1, beta2 = group["adamw_betas"]
        state["moment1"].lerp_(grad, 1 - beta1)
        state["moment2"].lerp_(grad * grad, 1 - beta2)
        corrected = (1 - beta1 ** state["step"]) / math.sqrt(1 - beta2 ** state["step"])
        param.sub_(lr / corrected * state["moment1"] / (group["adamw_eps"] + state["moment2"].sqrt()))


class FsdpOptimizers(Moonlight):
    """The same with Jordan's scale, a decay of its own for AdamW, none for matrices, and flattened weights."""

    scale = staticmethod(lambda rows, cols: math.sqrt(max(1, rows / cols)))
    flag = int

    def __init__(self, muon: Sequence[Tensor], adamw: Sequence[Tensor], **settings: Any) -> None:
        super().__init__(muon, adamw, adamw_wd=0.1, adamw_lr_ratio=0.5, **settings)
        for group in self.param_groups:
            del group["wd"]
        del self.defaults["wd"]

    def decay(self, group: dict[str, Any], *, matrix: bool) -> float:
        return 0.0 if matrix else group["adamw_wd"]


class Dion(Base):
    """dion.Muon: sums, ``algorithm`` in the group, state from the beginning, AdamW's moments named otherwise."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        defaults = {"lr": 0.01, "mu": 0.95, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.01, "cautious_wd": False}
        defaults |= {"algorithm": "muon", "step": 0, "epsilon": 1e-8, "nesterov": False, "flatten": False}
        super().__init__(groups, {**defaults, "adjust_lr": "spectral_norm"})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["momentum"] = torch.zeros_like(param)
                if group["algorithm"] == "adamw":
                    self.state[param].update(variance=torch.zeros_like(param), step_dev=torch.zeros(()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "step_dev" in state:
                state["step_dev"] = state["step_dev"].float()

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
        super().step()

    def update(self, param, grad, state, group):  # type: ignore[no-untyped-def]
        lr = group["lr"]
        param.mul_(1 - lr * group["weight_decay"])
        if group["algorithm"] == "adamw":
            state["step_dev"] += 1
            step, betas = int(state["step_dev"]), (group["beta1"], group["beta2"])
            param.sub_(lr * adam_direction(grad, state["momentum"], state["variance"], step, betas, group["epsilon"]))
            return
        total = state["momentum"].mul_(group["mu"]).add_(grad)
        blended = total * group["mu"] + grad if group["nesterov"] else total
        matrices = blended.flatten(1) if group["flatten"] else blended
        rows, cols = matrices.shape[-2:]
        scales = {"spectral_norm": math.sqrt(rows / cols), "rms_norm": 0.2 * math.sqrt(max(rows, cols)), None: 1.0}
        direction = polar(matrices, DION, eps=group["epsilon"], safety=1.02)
        param.sub_(lr * scales[group["adjust_lr"]] * direction.view_as(param))


class MuonFsdp2(Base):
    """Averages named ``m``, ``wd``, state from the beginning."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        for group in self.param_groups:
            for param in group["params"]:
                keys = ("m",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")
                self.state[param].update({key: torch.zeros_like(param) for key in keys})
                if not group["use_muon"]:
                    self.state[param]["step"] = 0

    def update(self, param, grad, state, group):  # type: ignore[no-untyped-def]
        param.mul_(1 - group["lr"] * group["wd"])
        if not group["use_muon"]:
            state["step"] += 1
            moments = state["exp_avg"], state["exp_avg_sq"]
            param.sub_(group["lr"] * adam_direction(grad, *moments, state["step"], group["betas"], group["eps"]))
            return
        state["m"].lerp_(grad, 1 - group["momentum"])
        blended = grad.lerp(state["m"], group["momentum"])
        scale = math.sqrt(max(1, param.size(-2) / param.size(-1)))
        param.sub_(group["lr"] * scale * polar(blended, [QUINTIC] * group["ns_steps"], eps=1e-7))
