"""Pretrain a small Llama under tensor parallelism inside of HSDP, on a mesh of 2 replicas x shards x 2.

torchrun --standalone --nproc_per_node 8 examples/hsdp_tp.py 200    # or 4: shards of one rank
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
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
    mesh = init_device_mesh(device.type, (2, max(world // 4, 1), 2), mesh_dim_names=("replicate", "shard", "tp"))
    batches = iter(train_loader(corpus, data, device_batch=8, rank=rank // 2, world_size=world // 2))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=corpus.vocab_size, tie_word_embeddings=False, **SIZES)).to(device)
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], plan)
        fully_shard(layer, mesh=mesh["replicate", "shard"])
    fully_shard(model, mesh=mesh["replicate", "shard"])
    optimizer = distmuon.Muon(model, lr=6e-3, adjust_lr_fn="match_rms_adamw")  # after all of that
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        ids = next(batches)["input_ids"].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        distmuon.clip_grad_norm_(model.parameters(), 1.0)  # over both meshes
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)
        if rank == 0 and (step % 10 == 0 or step in (1, steps)):
            print(f"step {step}  loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
