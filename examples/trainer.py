"""Pretrain a small Llama by the Trainer of transformers, on one device or several.

python examples/trainer.py 200
torchrun --standalone --nproc_per_node 2 examples/trainer.py 200
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from distmuon.integrations.transformers import MuonFactory, MuonMetrics
from distmuon.pretrain.data import DataConfig, open_corpus
from distmuon.pretrain.data.windows import Batch, Windows

SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}


def labelled(batch: Batch) -> Batch:
    """What the model takes; it shifts the labels itself."""
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}


def main(steps: int) -> None:
    """Train for so many steps."""
    arguments = TrainingArguments(
        output_dir="runs/trainer",
        max_steps=steps,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        logging_steps=10,
        save_steps=100,
        remove_unused_columns=False,
        report_to="none",
    )
    torch.manual_seed(0)
    data = DataConfig(sequence_length=128, max_megabytes=2)  # bytes as tokens: no tokenizer to download
    corpus = open_corpus(data)
    config = LlamaConfig(vocab_size=corpus.vocab_size, tie_word_embeddings=False, **SIZES)
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        data_collator=labelled,
        train_dataset=Windows(corpus.train, data.sequence_length),
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": 6e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}),
        callbacks=[MuonMetrics()],
    )
    trainer.train()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
