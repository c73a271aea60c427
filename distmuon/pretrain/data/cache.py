"""Tokenize a text once: later runs find the shards again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from distmuon.pretrain.data.config import DataConfig
from distmuon.pretrain.data.documents import open_documents
from distmuon.pretrain.data.metadata import read_metadata
from distmuon.pretrain.data.tokenize import tokenize_to_shards

_VERSION = 1  # raised when the same settings would give other tokens
_IGNORED = {"sequence_length", "seed", "cache_dir"}  # settings that do not change the tokens


def cache_root(config: DataConfig) -> Path:
    """The folder of all cached corpora; ``data.cache_dir``, or ``distmuon`` in the user's cache folder."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distmuon"


def cached_shards(config: DataConfig) -> Path:
    """The folder with the shards of a text source; they are written on the first call.

    The name is a hash of the settings and of the names, sizes and times of the files, so a changed source
    is tokenized anew. The folder is built under a temporary name and renamed, so several processes may
    ask at once.

    Raises:
        UserError: As ``tokenize_to_shards``.
    """
    root = cache_root(config)
    target = root / f"tokens-{_fingerprint(config)}"
    if read_metadata(target) is not None:
        return target
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    try:
        tokenize_to_shards(config, building)
        building.chmod(0o755)  # mkdtemp makes it private, but a cache may be shared
        try:
            building.rename(target)
        except OSError:
            # another process was first; its result is the same
            if read_metadata(target) is None:
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _fingerprint(config: DataConfig) -> str:
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _IGNORED}
    files = list(open_documents(config).files)
    tokenizer = Path(config.tokenizer).expanduser()
    if tokenizer.is_dir():
        files += sorted(path for path in tokenizer.iterdir() if path.is_file())
    described = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    content = json.dumps([_VERSION, settings, described], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", errors="surrogateescape")).hexdigest()[:24]
