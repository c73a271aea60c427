"""Training data: text or token shards in, resumable batches out.

``open_corpus`` opens what a ``DataConfig`` names, ``train_loader`` and ``val_batches`` read it, and
``tokenize_to_shards`` writes shards for later.
"""

from distmuon.pretrain.data.config import DataConfig
from distmuon.pretrain.data.corpus import Corpus, check_vocabulary, open_corpus
from distmuon.pretrain.data.loader import train_loader, val_batches
from distmuon.pretrain.data.shards import read_shard, write_shard
from distmuon.pretrain.data.stream import TokenStream
from distmuon.pretrain.data.tokenize import tokenize_to_shards
from distmuon.pretrain.data.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "TokenStream",
    "Tokenizer",
    "check_vocabulary",
    "open_corpus",
    "open_tokenizer",
    "read_shard",
    "tokenize_to_shards",
    "train_loader",
    "val_batches",
    "write_shard",
]
