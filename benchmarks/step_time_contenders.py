"""What step_time.py compares: the models as lists of shapes, and how each optimizer is built."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import distmuon

Shape = tuple[int, int]
# Small enough that the thousandth step computes with the same kind of numbers as the first
_LR, _WEIGHT_DECAY = 1e-4, 0.1
BASELINE = ("torch.optim.Muon", "replicated")


def _llama(layers: int, hidden: int, kv: int, heads: int, wide: int) -> tuple[int, list[Shape]]:
    """``heads`` and ``kv`` are the widths of all query heads and of all key or value heads together."""
    attention = [(heads, hidden), (kv, hidden), (kv, hidden), (hidden, heads)]
    return layers, [*attention, (wide, hidden), (wide, hidden), (hidden, wide)]


# Hidden matrices only: number of blocks, shapes (out, in) in a block
MODELS: dict[str, tuple[int, list[Shape]]] = {
    "tiny": (2, [(64, 64)] * 4 + [(128, 64), (64, 128)]),
    "blocks_512": (8, [(512, 512)] * 4 + [(2048, 512), (512, 2048)]),
    "gpt2_124m": (12, [(2304, 768), (768, 768), (3072, 768), (768, 3072)]),
    "gpt2_124m_split_qkv": (12, [(768, 768)] * 4 + [(3072, 768), (768, 3072)]),
    "qwen3_0.6b": _llama(28, 1024, 1024, 2048, 3072),
    "llama3.2_1b": _llama(16, 2048, 512, 2048, 8192),
    "llama3_8b": _llama(32, 4096, 1024, 4096, 14336),
}


@dataclass(frozen=True)
class Contender:
    """An optimizer on a layout.

    Attributes:
        name: Shown in the table.
        layout: ``"replicated"`` (every rank holds every matrix) or ``"FSDP2"``.
        build: From the parameters of that layout and the mesh of all ranks.
        divides: Whether ranks share the work, so that results or shards must travel.
        note: What the reader must know to compare it.
    """

    name: str
    layout: str
    build: Callable[[list[nn.Parameter], DeviceMesh], torch.optim.Optimizer]
    divides: bool
    note: str = ""


@dataclass(frozen=True)
class Peer:
    """How another project's Muon is recognised and called; ``build`` takes its module first."""

    name: str
    marker: str
    module: str
    layouts: tuple[str, ...]
    build: Callable[[Any, list[nn.Parameter], DeviceMesh, str], torch.optim.Optimizer]
    note: str


def contenders(
    device: str, *, ours_settings: Sequence[str], peer_paths: Sequence[str], compile_peers: bool
) -> list[Contender]:
    """All contenders that are there, in the order of the table.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        ours_settings: Each adds rows of distmuon with those settings: ``"ns_steps=4 wire_dtype=float32"``.
        peer_paths: Folders with a checkout of a project in ``PEERS``.
        compile_peers: Leave torch.compile to the peers; False replaces it by the identity.

    Raises:
        ValueError: for a folder without a known project, or settings that cannot be read.
    """
    found = [
        Contender("AdamW", layout, _adamw(fused), divides=False, note="torch's fused kernel" if fused else "")
        for fused in ((False, True) if device == "cuda" else (False,))
        for layout in ("replicated", "FSDP2")
    ]
    found.append(Contender(*BASELINE, _torch_muon, divides=False))
    found.append(Contender("torch.optim.Muon", "FSDP2", _torch_muon, divides=True))
    for text in ("", *ours_settings):
        settings = parse_settings(text)
        name = f"distmuon {text}".strip()
        found.append(Contender(name, "replicated", _distmuon(settings, replicated=True), divides=True))
        found.append(Contender(name, "FSDP2", _distmuon(settings, replicated=False), divides=True))
    for peer, folder in _find_peers(peer_paths):
        module = _load(peer, folder, compile_peers)
        for layout in peer.layouts:
            found.append(Contender(peer.name, layout, _peer(peer, module, layout), divides=True, note=peer.note))
    return found


def parse_settings(text: str) -> dict[str, Any]:
    """Keyword arguments from ``"ns_steps=4 wire_dtype=float32"``.

    Raises:
        ValueError: for a word without ``=``, or a dtype that torch does not have.
    """
    settings: dict[str, Any] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--ours-settings: found {word!r}, wanted NAME=VALUE; separate them by spaces.")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
        if key.endswith("dtype") and isinstance(settings[key], str):
            settings[key] = getattr(torch, value, None)
            if not isinstance(settings[key], torch.dtype):
                raise ValueError(f"--ours-settings: {key} is {value!r}, wanted a dtype of torch such as bfloat16.")
    return settings


def _adamw(fused: bool) -> Callable[[list[nn.Parameter], DeviceMesh], torch.optim.Optimizer]:
    return lambda params, mesh: torch.optim.AdamW(params, lr=_LR, weight_decay=_WEIGHT_DECAY, fused=fused or None)


def _torch_muon(params: list[nn.Parameter], mesh: DeviceMesh) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, lr=_LR, weight_decay=_WEIGHT_DECAY)


def _distmuon(
    settings: dict[str, Any], *, replicated: bool
) -> Callable[[list[nn.Parameter], DeviceMesh], torch.optim.Optimizer]:
    def build(params: list[nn.Parameter], mesh: DeviceMesh) -> torch.optim.Optimizer:
        where: dict[str, Any] = {"mesh": mesh} if replicated else {}
        groups = [{"params": params, "use_muon": True}]
        return distmuon.Muon(groups, lr=_LR, weight_decay=_WEIGHT_DECAY, **where, **settings)

    return build


def _peer(peer: Peer, module: Any, layout: str) -> Callable[[list[nn.Parameter], DeviceMesh], torch.optim.Optimizer]:
    return lambda params, mesh: peer.build(module, params, mesh, layout)


def _build_dion(module: Any, params: list[nn.Parameter], mesh: DeviceMesh, layout: str) -> torch.optim.Optimizer:
    on_gpu = params[0].is_cuda
    return module.Muon(
        params,
        distributed_mesh=mesh if layout == "FSDP2" else mesh.get_group(),
        lr=_LR,
        weight_decay=_WEIGHT_DECAY,
        nesterov=True,
        use_polar_express=False,
        use_triton=on_gpu,
        newton_schulz_func=None if on_gpu else plain_quintic,
    )


def _build_keller(module: Any, params: list[nn.Parameter], mesh: DeviceMesh, layout: str) -> torch.optim.Optimizer:
    return module.Muon(params, lr=_LR, weight_decay=_WEIGHT_DECAY)


def _build_muon_fsdp2(module: Any, params: list[nn.Parameter], mesh: DeviceMesh, layout: str) -> torch.optim.Optimizer:
    group = {"params": params, "use_muon": True, "lr": _LR, "weight_decay": _WEIGHT_DECAY, "rms_scale": False}
    return module.Muon([group])


PEERS = (
    Peer(
        "microsoft/dion Muon",
        "dion/muon.py",
        "dion",
        ("replicated", "FSDP2"),
        _build_dion,
        "5 plain quintic steps passed as newton_schulz_func (CUDA: its Triton kernel and own 5 triples)",
    ),
    Peer("KellerJordan/Muon", "muon.py", "muon", ("replicated",), _build_keller, "gathers parameters, not updates"),
    Peer("muon-fsdp2", "muon_fsdp2.py", "muon_fsdp2", ("FSDP2",), _build_muon_fsdp2, "its wire is float32"),
)


def plain_quintic(x: Tensor, epsilon: float | Tensor = 1e-7) -> Tensor:
    """Five steps of Keller Jordan's quintic on ``(..., m, n)``, in bfloat16, as the peers write it."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.bfloat16()
    tall = y.size(-2) > y.size(-1)
    y = y.mT if tall else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + epsilon)
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if tall else y


def _find_peers(folders: Sequence[str]) -> Iterator[tuple[Peer, pathlib.Path | None]]:
    """Peers with the folder to import from, None for one that is installed."""
    given = set()
    for folder in folders:
        # dion is asked first: its checkout could hold a muon.py too
        peer = next((peer for peer in PEERS if (pathlib.Path(folder) / peer.marker).is_file()), None)
        if peer is None:
            wanted = ", ".join(f"{peer.marker} ({peer.name})" for peer in PEERS)
            raise ValueError(f"--peer-path {folder}: found no peer, wanted a folder that holds one of {wanted}.")
        given.add(peer.name)
        yield peer, pathlib.Path(folder)
    installed = next(peer for peer in PEERS if peer.module == "muon_fsdp2")
    if installed.name not in given and importlib.util.find_spec(installed.module):
        yield installed, None


def _load(peer: Peer, folder: pathlib.Path | None, compile_peers: bool) -> Any:
    """Import a peer; with ``compile_peers`` False its functions stay as they are written."""
    if folder is not None:
        sys.path.insert(0, str(folder.resolve()))
    with contextlib.nullcontext() if compile_peers else mock.patch("torch.compile", _identity):
        return importlib.import_module(peer.module)


def _identity(function: Any = None, **_: Any) -> Any:
    return (lambda inner: inner) if function is None else function


def world_mesh(device: str) -> DeviceMesh:
    """The 1-D mesh of all ranks."""
    return init_device_mesh(device, (dist.get_world_size(),))
