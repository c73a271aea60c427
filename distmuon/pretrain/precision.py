"""Which device a run uses and in which precision its forward pass is."""

from __future__ import annotations

import contextlib
import os

import torch

from distmuon.numerics.hardware import has_native_bf16
from distmuon.pretrain.config import TrainConfig
from distmuon.pretrain.errors import UserError


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of ``train.device``; ``auto`` is an accelerator where there is one.

    Args:
        name: The setting.
        local_rank: Number of the process on this machine, which takes the CUDA device of the same number and makes
            it torch's current one; None for a single process.

    Raises:
        UserError: If torch has no such device here.
    """
    if local_rank is not None:
        return _device_of_rank(name, local_rank)
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"train.device is {name!r}, which torch {torch.__version__} cannot use here: "
            "set it to auto or cpu, or install a torch build for the device."
        ) from error
    return device


def _device_of_rank(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UserError(
            f"train.device is {name!r}, and a run of several processes takes cuda or cpu, each process the device of "
            "its number: set it to auto."
        )
    device = choose_device("cuda")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this machine has {torch.cuda.device_count()} CUDA devices and process {local_rank} of the run: start at "
            "most one process a device (torchrun --nproc_per_node), or set train.device to cpu."
        )
    torch.cuda.set_device(local_rank)
    return torch.device(device.type, local_rank)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of ``train.dtype``; ``auto`` is bfloat16 where the device multiplies it natively."""
    if name == "auto":
        return torch.bfloat16 if has_native_bf16(device.type) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass; float32 needs none."""
    if dtype is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def set_up_torch(config: TrainConfig) -> None:
    """Set threads and determinism of the process, as the ``train`` section says."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads it when its first handle is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Device and precision in words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"CPU, {torch.get_num_threads()} threads"
    else:
        name = str(device)
    how = "float32" if dtype is torch.float32 else "bfloat16 autocast, float32 parameters"
    return f"{name}, {how}"


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given, so that a host clock means something."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
