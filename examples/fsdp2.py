"""Pretrain a small Llama under FSDP2: every rank has a slice of each matrix, and the updates are those of one device.

torchrun --standalone --nproc_per_node 2 examples/fsdp2.py 200
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import distmuon
from distmuon.pretrain.data import DataConfig, open_corpus, train_loader

SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}


def main(steps: int) -> None:
    """Train for so many steps."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights on all ranks
    data = DataConfig(sequence_length=128, max_megabytes=2)  # bytes as tokens: no tokenizer to download
    corpus = open_corpus(data)
    batches = iter(train_loader(corpus, data, device_batch=8, rank=rank, world_size=world))
    config = LlamaConfig(vocab_size=corpus.vocab_size, tie_word_embeddings=False, **SIZES)
    model = LlamaForCausalLM(config).to(device)
    mesh = init_device_mesh(device.type, (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = distmuon.Muon(model, lr=6e-3, adjust_lr_fn="match_rms_adamw")  # after the model is sharded
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for step in range(1, steps + 1):
        ids = next(batches)["input_ids"].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)
        if rank == 0 and (step % 10 == 0 or step in (1, steps)):
            print(f"step {step}  loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
