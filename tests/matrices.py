"""Matrix families that tests of accuracy run on, and the measures of closeness to the polar factor."""

import pathlib
import sys

import torch
from torch import Tensor, nn

import distmuon

BENCHMARKS = str(pathlib.Path(__file__).parent.parent / "benchmarks")

if BENCHMARKS not in sys.path:
    sys.path.append(BENCHMARKS)

from matrix_families import (  # noqa: E402
    FAMILIES,
    Closeness,
    closeness,
    gauss,
    log_spaced,
    lognormal,
    low_rank,
    power_law,
)

__all__ = [
    "FAMILIES",
    "Closeness",
    "closeness",
    "gauss",
    "log_spaced",
    "lognormal",
    "low_rank",
    "momenta",
    "power_law",
]


def momenta(steps: int = 30) -> list[Tensor]:
    """Momentum of a small language model on real text, far from Gaussian."""
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(open(torch.nn.functional.__file__, "rb").read()), dtype=torch.uint8).long()
    width, length = 64, 32
    model = nn.Sequential(
        nn.Embedding(256, width),
        nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True),
        nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True),
        nn.Linear(width, 256),
    )
    optimizer = distmuon.Muon(
        model, lr=3e-3, adjust_lr_fn="match_rms_adamw", ns_coefficients="quintic", ns_dtype=torch.float32
    )
    for step in range(steps):
        start = torch.arange(8)[:, None] * 997 + step * 8191
        tokens = text[(start + torch.arange(length + 1)) % len(text)]
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    matrices = next(group for group in optimizer.param_groups if group["use_muon"])["params"]
    return [optimizer.state[param]["momentum_buffer"].clone() for param in matrices]
