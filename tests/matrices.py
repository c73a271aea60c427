"""Matrix families that tests of accuracy run on, and the measures of closeness to the polar factor."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import distmuon


def gauss(m: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(m, n, generator=generator)


def log_spaced(m: int, n: int, generator: torch.Generator) -> Tensor:
    return _with_spectrum(m, n, torch.logspace(0, -6, min(m, n)), generator)


def low_rank(m: int, n: int, generator: torch.Generator) -> Tensor:
    rank = max(1, min(m, n) // 16)
    return torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)


def lognormal(m: int, n: int, generator: torch.Generator) -> Tensor:
    rows = torch.randn(m, 1, generator=generator).exp()
    cols = torch.randn(1, n, generator=generator).exp()
    return gauss(m, n, generator) * rows * cols


def power_law(m: int, n: int, generator: torch.Generator) -> Tensor:
    return _with_spectrum(m, n, torch.arange(1, min(m, n) + 1).float() ** -1.5, generator)


FAMILIES = (gauss, log_spaced, low_rank, lognormal, power_law)


def _with_spectrum(m: int, n: int, sigma: Tensor, generator: torch.Generator) -> Tensor:
    k = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return ((u * sigma.double()) @ v.T).float()


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
    optimizer = distmuon.Muon(model, lr=3e-3, adjust_lr_fn="match_rms_adamw", ns_dtype=torch.float32)
    for step in range(steps):
        start = torch.arange(8)[:, None] * 997 + step * 8191
        tokens = text[(start + torch.arange(length + 1)) % len(text)]
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    matrices = next(group for group in optimizer.param_groups if group["use_muon"])["params"]
    return [optimizer.state[param]["momentum_buffer"].clone() for param in matrices]


@dataclass
class Closeness:
    """How ``y`` compares with the polar factor of ``x`` on directions with sigma >= 1e-3 ||x||_F.

    error: ``||U^T y V - I||_F / sqrt(k)``; off: its off-diagonal part; low and high: the diagonal's range.
    """

    error: float
    off: float
    low: float
    high: float


def closeness(x: Tensor, y: Tensor) -> Closeness:
    u, sigma, vh = torch.linalg.svd(x.double(), full_matrices=False)
    keep = sigma >= 1e-3 * sigma.norm()
    core = u[:, keep].T @ y.double() @ vh[keep].T
    diagonal = core.diagonal()
    k = diagonal.numel()
    error = (core - torch.eye(k, dtype=core.dtype)).norm() / k**0.5
    off = (core - torch.diag(diagonal)).norm() / k**0.5
    return Closeness(error.item(), off.item(), diagonal.min().item(), diagonal.max().item())
