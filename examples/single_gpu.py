"""Pretrain a small Llama on the text of Python's own library, on one GPU or on the CPU.

python examples/single_gpu.py 200
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import distmuon
from distmuon.pretrain.data import DataConfig, open_corpus, train_loader

SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}


def main(steps: int) -> None:
    """Train for so many steps."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(0)
    data = DataConfig(sequence_length=128, max_megabytes=2)  # bytes as tokens: no tokenizer to download
    corpus = open_corpus(data)
    batches = iter(train_loader(corpus, data, device_batch=8))
    config = LlamaConfig(vocab_size=corpus.vocab_size, tie_word_embeddings=False, **SIZES)
    model = LlamaForCausalLM(config).to(device)

    # with this scale of the learning rate one lr, that of AdamW, serves matrices and all the rest
    optimizer = distmuon.Muon(model, lr=6e-3, adjust_lr_fn="match_rms_adamw")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    print(optimizer.report().summary)

    for step in range(1, steps + 1):
        ids = next(batches)["input_ids"].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step in (1, steps):
            print(f"step {step}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
