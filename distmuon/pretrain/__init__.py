"""Pretraining of language models, to use Muon and to measure it.

On the command line ``python -m distmuon.pretrain --config configs/debug.yaml``; from Python::

    from distmuon.pretrain import load_config, train

    summary = train(load_config("configs/debug.yaml", "--optim.lr=0.001"))
"""

try:
    from distmuon.pretrain.config import (
        CheckpointConfig,
        Config,
        LogConfig,
        ModelConfig,
        OptimConfig,
        ParallelConfig,
        TrainConfig,
    )
    from distmuon.pretrain.data import DataConfig
    from distmuon.pretrain.errors import RankLost, UserError
    from distmuon.pretrain.interrupt import Interrupted
    from distmuon.pretrain.parse import load_config
    from distmuon.pretrain.report import Summary
    from distmuon.pretrain.run import train
except ModuleNotFoundError as error:
    if (error.name or "").startswith("distmuon"):
        raise
    raise ModuleNotFoundError(
        f"distmuon.pretrain needs the package {error.name}: pip install 'distmuon[pretrain]'", name=error.name
    ) from error

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Interrupted",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RankLost",
    "Summary",
    "TrainConfig",
    "UserError",
    "load_config",
    "train",
]
