"""The Muon family as its papers write it: float64, one whole matrix, one process.

Transcribed from the papers, line by line and in their notation; nothing here is taken from distmuon, so that a
misreading there is not repeated here. A rule keeps its state and maps ``(weight, grad)`` to the next weight; matrices
are ``(m, n)`` = (out, in) as torch.nn.Linear stores them. How to orthogonalize is handed over: :func:`polar` is exact,
and a test that compares steps hands over the function of what it compares with.

Where papers leave something open, the argument says so and its default is what docs/family.md says is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Orthogonalize = Callable[[Tensor], Tensor]
Size = Callable[[int, int], float]


def polar(matrix: Tensor) -> Tensor:
    """``U V^T`` of the reduced SVD ``U S V^T``, without the directions whose singular value is zero."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = values > values.max() * max(matrix.shape) * torch.finfo(torch.float64).eps
    return (left * kept) @ right


def jordan_scale(m: int, n: int) -> float:
    """Keller Jordan, https://kellerjordan.github.io/posts/muon: ``sqrt(max(1, m/n))``."""
    return math.sqrt(max(1.0, m / n))


def moonlight_scale(m: int, n: int) -> float:
    """arXiv 2502.16982, eq. 4: ``0.2 sqrt(max(m, n))``."""
    return 0.2 * math.sqrt(max(m, n))


def spectral_scale(m: int, n: int) -> float:
    """arXiv 2410.21265, the duality map of a linear layer, and 2502.07529, table 2: ``sqrt(m/n)``, not clamped."""
    return math.sqrt(m / n)


def unit_scale(m: int, n: int) -> float:
    """arXiv 2510.12402, algorithm 5, and 2502.16982, eq. 1: no factor."""
    return 1.0


def cautious(weight: Tensor, update: Tensor) -> Tensor:
    """``I(u x >= 0) x``, what cautious weight decay decays: arXiv 2510.12402, algorithm 1 and section 3.

    ``update`` is what is subtracted, ``weight`` what it is subtracted from. A weight whose update is zero is decayed.
    """
    return (update * weight >= 0).to(weight.dtype) * weight


class Muon:
    """Muon: arXiv 2502.16982 (Moonlight), eqs. 1-4, 2510.12402, algorithm 5 with ``cautious_wd``.

    ::

        M <- mu M + G                                       eq. 1
        O <- Orth(M), with Nesterov Orth(G + mu M)
        W <- W - eta (scale(m, n) O + lambda W)             eqs. 3 and 4

    Momentum is a sum here, as all papers of the family but NorMuon and Scion have it, and zero at first.

    Args:
        orthogonalize: ``Orth``.
        lr: ``eta``.
        weight_decay: ``lambda``.
        momentum: ``mu``.
        nesterov: No paper of the family writes it; Jordan's code and those of their authors have it.
        scale: Factor by shape.
        cautious_wd: ``lambda I(O W >= 0) W`` in place of ``lambda W``.
    """

    def __init__(
        self,
        orthogonalize: Orthogonalize = polar,
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = False,
        scale: Size = moonlight_scale,
        cautious_wd: bool = False,
    ) -> None:
        self.orthogonalize = orthogonalize
        self.lr, self.weight_decay, self.mu = lr, weight_decay, momentum
        self.nesterov, self.scale, self.cautious_wd = nesterov, scale, cautious_wd
        self.sum: Tensor | None = None

    def __call__(self, weight: Tensor, grad: Tensor) -> Tensor:
        update = self.direction(self.blend(grad.double()))
        return self.apply(weight.double(), update)

    def blend(self, grad: Tensor) -> Tensor:
        """The momentum that is orthogonalized."""
        self.sum = grad.clone() if self.sum is None else self.mu * self.sum + grad
        return grad + self.mu * self.sum if self.nesterov else self.sum

    def direction(self, blended: Tensor) -> Tensor:
        """What is subtracted, over the learning rate."""
        return self.scale(*blended.shape) * self.orthogonalize(blended)

    def apply(self, weight: Tensor, update: Tensor) -> Tensor:
        """Subtract it, and decay."""
        decayed = cautious(weight, update) if self.cautious_wd else weight
        return weight - self.lr * (update + self.weight_decay * decayed)


def adam_size(m: int, n: int) -> float:
    """Frobenius norm of an update of which the elements have a root mean square of 0.2: ``0.2 sqrt(m n)``."""
    return 0.2 * math.sqrt(m * n)


def size_of(scale: Size) -> Size:
    """Frobenius norm of ``scale(m, n) O`` where ``O`` has full rank; of :func:`moonlight_scale` it is adam_size."""
    return lambda m, n: scale(m, n) * math.sqrt(min(m, n))


def _to_size(matrix: Tensor, size: float) -> Tensor:
    norm = torch.linalg.matrix_norm(matrix)
    return matrix * (size / norm) if norm > 0 else matrix  # no paper says what 0/0 is


class NorMuon(Muon):
    """NorMuon: arXiv 2510.05491, section 3.1 and algorithm 1.

    ::

        M  <- b1 M + (1 - b1) G                             line 5
        O  <- NS5(M)                                        line 6
        v  <- b2 v + (1 - b2) mean_cols(O * O)              line 7: a number a row; v = 0 at first
        O' <- O / (sqrt(v) + eps)                           line 9, after v has seen this O; no bias correction
        W  <- W - eta lambda W - 0.2 eta sqrt(m n) / |O'|_F O'      lines 10 and 11

    Args:
        orthogonalize: ``NS5``.
        beta2: ``b2``, 0.95 in all runs of the paper.
        eps: The text gives no value. 1e-8 as in microsoft/dion; the authors' code has 1e-10.
        nesterov: The paper has none, the authors' code has it.
        size: Frobenius norm of the update over ``lr``, which in the paper is :func:`adam_size`. The authors' code keeps
            that of ``O``, times a scale by shape.
        **keywords: As :class:`Muon`; ``momentum`` is ``b1``.
    """

    def __init__(
        self,
        orthogonalize: Orthogonalize = polar,
        *,
        beta2: float = 0.95,
        eps: float = 1e-8,
        size: Size = adam_size,
        **keywords,
    ) -> None:
        super().__init__(orthogonalize, **keywords)
        self.beta2, self.eps, self.size = beta2, eps, size
        self.second: Tensor | None = None

    def blend(self, grad: Tensor) -> Tensor:
        past = torch.zeros_like(grad) if self.sum is None else self.sum
        self.sum = self.mu * past + (1 - self.mu) * grad
        return self.mu * self.sum + (1 - self.mu) * grad if self.nesterov else self.sum

    def direction(self, blended: Tensor) -> Tensor:
        rows, cols = blended.shape
        ortho = self.orthogonalize(blended)
        mean = (ortho * ortho).sum(1, keepdim=True) / cols
        past = torch.zeros(rows, 1, dtype=torch.float64) if self.second is None else self.second
        self.second = self.beta2 * past + (1 - self.beta2) * mean
        return _to_size(ortho / (self.second.sqrt() + self.eps), self.size(rows, cols))


class AdaMuon(Muon):
    """AdaMuon: arXiv 2507.11005, algorithm 1, as https://github.com/Chongjie-Si/AdaMuon shows it.

    ::

        M  <- beta M + G
        O  <- NewtonSchulz(Sign(M))
        V  <- beta V + (1 - beta) O * O                     V = 0 at first, no bias correction
        O^ <- O / (sqrt(V) + eps)
        W  <- W - eta (0.2 sqrt(m n) / |O^|_F O^ + lambda W)

    pytorch_optimizer has no Sign, of which the abstract of the paper's first version does not speak either.

    Args:
        orthogonalize: ``NewtonSchulz``.
        beta2: Of ``V``; None takes ``momentum``, as the paper has one beta.
        eps: The paper gives no value; 1e-8 in the authors' code.
        nesterov: The paper has none. The authors' code takes the sign of ``G + mu M``.
        size: As :class:`NorMuon`.
        **keywords: As :class:`Muon`.
    """

    def __init__(
        self,
        orthogonalize: Orthogonalize = polar,
        *,
        beta2: float | None = None,
        eps: float = 1e-8,
        size: Size = adam_size,
        **keywords,
    ) -> None:
        super().__init__(orthogonalize, **keywords)
        self.beta2, self.eps, self.size = self.mu if beta2 is None else beta2, eps, size
        self.second: Tensor | None = None

    def direction(self, blended: Tensor) -> Tensor:
        ortho = self.orthogonalize(torch.sign(blended))
        past = torch.zeros_like(ortho) if self.second is None else self.second
        self.second = self.beta2 * past + (1 - self.beta2) * ortho * ortho
        return _to_size(ortho / (self.second.sqrt() + self.eps), self.size(*ortho.shape))


class MuonBP(Muon):
    """MuonBP, blocks of rows: arXiv 2510.16981. Decay at ``eta_full`` in all steps is a choice.

    ::

        M <- mu M + G
        t mod P = 0:  O <- Orth(M),                         W <- W - eta_full (scale(m, n) O + lambda W)
        else, for each block:  O_j <- Orth(M_j),          W_j <- W_j - eta_block scale(m_j, n) O_j - eta_full lambda W_j

    Steps are matched to AdamW's by the shape that was orthogonalized: that of the matrix, or that of the block.

    Args:
        orthogonalize: ``Orth``.
        period: ``P``.
        blocks: How many, cut as torch.chunk and FSDP2 cut rows, which may make fewer.
        block_lr_ratio: ``eta_block / eta_full``; the theory puts it between ``1/sqrt(blocks)`` and 1.
        first: ``t`` of the first step; 0, a choice, begins with whole matrices.
        **keywords: As :class:`Muon`.
    """

    def __init__(
        self,
        orthogonalize: Orthogonalize = polar,
        *,
        period: int,
        blocks: int,
        block_lr_ratio: float = 1.0,
        first: int = 0,
        **keywords,
    ) -> None:
        super().__init__(orthogonalize, **keywords)
        self.period, self.blocks, self.ratio, self.time = period, blocks, block_lr_ratio, first

    def direction(self, blended: Tensor) -> Tensor:
        whole, self.time = self.time % self.period == 0, self.time + 1
        if whole:
            return super().direction(blended)
        parts = [super(MuonBP, self).direction(block) for block in blended.chunk(self.blocks)]
        return self.ratio * torch.cat(parts)


class AdamW:
    """AdamW (Loshchilov & Hutter), and with ``cautious_wd`` arXiv 2510.12402, algorithm 6.

    ::

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  m^ = m / (1 - b1^t);  v^ = v / (1 - b2^t)
        x <- x - eta (m^ / (sqrt(v^) + eps) + lambda I(m^ x >= 0) x)
    """

    def __init__(
        self,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        cautious_wd: bool = False,
    ) -> None:
        self.lr, self.weight_decay, self.betas, self.eps, self.cautious_wd = lr, weight_decay, betas, eps, cautious_wd
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.time = 0

    def __call__(self, weight: Tensor, grad: Tensor) -> Tensor:
        weight, grad, (b1, b2) = weight.double(), grad.double(), self.betas
        self.time += 1
        self.first = b1 * self.first + (1 - b1) * grad
        self.second = b2 * self.second + (1 - b2) * grad**2
        first, second = self.first / (1 - b1**self.time), self.second / (1 - b2**self.time)
        decayed = cautious(weight, first) if self.cautious_wd else weight
        return weight - self.lr * (first / (second.sqrt() + self.eps) + self.weight_decay * decayed)


# The oracles of Scion, arXiv 2502.07529, tables 2 to 4: `lmo(A)` without its minus, so that it is subtracted. `A` is
# (d_out, d_in). Where a table divides by a norm of zero, which the paper leaves open, the result is zero. The authors'
# code adds `eps=1e-8` to what it divides by.


def _over(matrix: Tensor, norms: Tensor, eps: float) -> Tensor:
    return torch.where(norms > 0, matrix / (norms + eps), torch.zeros_like(matrix))


def lmo_spectral(matrix: Tensor, orthogonalize: Orthogonalize = polar, *, first: bool = False) -> Tensor:
    """Table 2, RMS -> RMS: ``sqrt(d_out/d_in) U V^T``; table 3, ``first`` layer: ``max(1, sqrt(d_out/d_in)) U V^T``."""
    scale = spectral_scale(*matrix.shape)
    return (max(1.0, scale) if first else scale) * orthogonalize(matrix)


def lmo_sign(matrix: Tensor, *, last: bool = True) -> Tensor:
    """Table 3, ``last`` layer: ``sign(A) / d_in``; table 4, a first layer with 1-hot input: ``sign(A)``."""
    return torch.sign(matrix) / (matrix.shape[1] if last else 1)


def lmo_col_norm(matrix: Tensor, *, eps: float = 0.0) -> Tensor:
    """Table 2, 1 -> RMS, for a first layer with 1-hot input: ``sqrt(d_out) col_j / |col_j|_2``.

    The weight of torch.nn.Embedding, (entries, width), is such a layer transposed: its rows are divided.
    """
    rms = matrix.norm(dim=0, keepdim=True) / math.sqrt(matrix.shape[0])
    return _over(matrix, rms, eps)


def lmo_row_norm(matrix: Tensor, *, eps: float = 0.0) -> Tensor:
    """Table 2, RMS -> inf: ``row_i / (sqrt(d_in) |row_i|_2)``."""
    norms = matrix.norm(dim=1, keepdim=True) * math.sqrt(matrix.shape[1])
    return _over(matrix, norms, eps)


def lmo_bias(vector: Tensor, *, eps: float = 0.0) -> Tensor:
    """Table 3, ``b_l``: ``b / |b|_RMS``."""
    return _over(vector, vector.square().mean(0, keepdim=True).sqrt(), eps)


class Scion:
    """Scion and unconstrained Scion: arXiv 2502.07529, algorithm 3.

    ::

        d <- alpha G + (1 - alpha) d                        d = 0 at first, no Nesterov
        W <- (1 - gamma) W + gamma rho lmo(d)               unconstrained: W + gamma rho lmo(d)

    Args:
        lmo: One of those above, which leave out the minus.
        gamma: Step size, in (0, 1).
        radius: ``rho``.
        alpha: Weight of the new gradient, so one minus what others call momentum.
        constrained: Whether the weight stays within ``rho`` in the norm of ``lmo``.
    """

    def __init__(
        self, lmo: Callable[[Tensor], Tensor], *, gamma: float, radius: float, alpha: float, constrained: bool
    ) -> None:
        self.lmo, self.gamma, self.radius, self.alpha, self.constrained = lmo, gamma, radius, alpha, constrained
        self.average: Tensor | float = 0.0

    def __call__(self, weight: Tensor, grad: Tensor) -> Tensor:
        self.average = self.alpha * grad.double() + (1 - self.alpha) * self.average
        kept = 1 - self.gamma if self.constrained else 1.0
        return kept * weight.double() - self.gamma * self.radius * self.lmo(self.average)


# The norms whose balls these oracles search, table 2, for what Scion promises of ||W||.
LMO_NORMS: Mapping[Callable[..., Tensor], Callable[[Tensor], Tensor]] = {
    lmo_spectral: lambda a: math.sqrt(a.shape[1] / a.shape[0]) * torch.linalg.matrix_norm(a, 2),
    lmo_sign: lambda a: a.shape[1] * a.abs().max(),
    lmo_col_norm: lambda a: a.norm(dim=0).max() / math.sqrt(a.shape[0]),
    lmo_row_norm: lambda a: math.sqrt(a.shape[1]) * a.norm(dim=1).max(),
    lmo_bias: lambda a: a.square().mean().sqrt(),
}


class MuonClip(Muon):
    """Kimi K2, arXiv 2507.20534, algorithm 1, lines 3 to 7: Muon without Nesterov, ``0.2 sqrt(max(m, n))``, decay."""

    def __init__(self, orthogonalize: Orthogonalize = polar, *, lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(orthogonalize, lr=lr, weight_decay=weight_decay, momentum=0.95, scale=moonlight_scale)


def qk_clip(
    query: Tensor, key: Tensor, logits: Tensor, *, tau: float = 100.0, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Kimi K2, section 2.1: ``gamma = min(1, tau / S)`` of each head; ``W_q gamma^alpha``, ``W_k gamma^(1 - alpha)``.

    Args:
        query: ``W_q``, whose rows are heads of one size.
        key: ``W_k``, as many heads.
        logits: ``S`` of each head, the largest that a forward pass saw.
        tau: Bound.
        alpha: Share of the queries.
    """
    gamma = torch.where(logits > tau, tau / logits, torch.ones_like(logits)).double()
    heads = len(gamma)

    def scaled(weight: Tensor, power: float) -> Tensor:
        rows = weight.double().reshape(heads, -1, weight.shape[1])
        return (rows * gamma[:, None, None] ** power).reshape(weight.shape)

    return scaled(query, alpha), scaled(key, 1 - alpha)
