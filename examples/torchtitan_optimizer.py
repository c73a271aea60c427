"""The optimizer of TorchTitan 0.3.0 replaced by this one, over every part of a model, in its container.

In a function of a config registry, in place of `optimizer=default_adamw(lr=8e-4)`:

    optimizer=MuonContainer.Config(muon={"lr": 8e-4, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"})
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchtitan.components.optimizer import OptimizersContainer

import distmuon


class MuonContainer(OptimizersContainer):
    """Steps, saves and loads one `distmuon.Muon` for each part of the model (pipeline stages; else there is one)."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Settings of the run.

        Attributes:
            muon: Arguments of `distmuon.Muon`; `param_groups` and `implementation` of TorchTitan are not read.
        """

        muon: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        # the modules themselves, sharded by now: their types say what is an embedding and what a hidden matrix
        self.optimizers = [distmuon.Muon(part, **config.muon) for part in model_parts]
        params = [param for optimizer in self for group in optimizer.param_groups for param in group["params"]]
        self._validate_params([param for param in params if param.requires_grad])
        self._post_init(params)
