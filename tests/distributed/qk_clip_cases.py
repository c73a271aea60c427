"""What ranks run for test_qk_clip_ranks.py: training with QK-Clip in several layouts."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import distmuon

STEPS, TAU, LAYERS = 3, 2.0, 2


def make_model(kind="llama"):
    import transformers

    torch.manual_seed(1)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.5,
    }
    if kind == "deepseek_v3":
        sizes |= {"num_key_value_heads": 6, "kv_lora_rank": 10, "q_lora_rank": 9, "qk_nope_head_dim": 3}
        sizes |= {"qk_rope_head_dim": 2, "v_head_dim": 5, "first_k_dense_replace": 9}
    if kind == "qwen2":  # biases
        sizes |= {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 3}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(0.2 * torch.randn_like(param))
    return model.train()


def batch_of(step, replicas, replica):
    """This replica's part of four sequences, of which the last is the loudest more often than not."""
    ids = torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(step))
    return ids.chunk(replicas)[replica]


def train(model, optimizer, replicas=1, replica=0, handle=None):
    """Steps of SGD, whose clip is all that could tell ranks apart.

    Returns:
        Largest logits of all layers by step, and the whole weights after the last.
    """
    maxima = []
    for step in range(STEPS):
        ids = batch_of(step, replicas, replica)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        maxima.append(torch.cat(list(handle.last_max_logits().values())))
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    whole = {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in inner.named_parameters()
    }
    return maxima, whole


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def alone(kind, gqa):
    model = make_model(kind)
    optimizer = optimizer_of(model)
    return train(model, optimizer, handle=distmuon.attach_qk_clip(model, optimizer, tau=TAU, gqa=gqa))


def in_layout(layout, kind, gqa):
    size, rank = dist.get_world_size(), dist.get_rank()
    model = make_model(kind)
    replicas, replica = size, rank
    early = layout.endswith("early")
    if layout == "ddp":
        model = DistributedDataParallel(model)
    elif layout.startswith("fsdp"):
        columns = (lambda param: Shard(param.ndim - 1)) if "columns" in layout else None
        if early:  # before parameters are swapped
            handle = distmuon.attach_qk_clip(model, tau=TAU, gqa=gqa)
        for layer in model.model.layers:
            fully_shard(layer, shard_placement_fn=columns)
        fully_shard(model, shard_placement_fn=columns)
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")} | {"o_proj": RowwiseParallel()}
        for layer in model.model.layers:
            parallelize_module(layer.self_attn, mesh["tp"], plan)
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        replicas, replica = size // 2, rank // 2
    optimizer = optimizer_of(model)
    if early:
        optimizer.register_step_post_hook(lambda *_: handle.step())
    else:
        handle = distmuon.attach_qk_clip(model, optimizer, tau=TAU, gqa=gqa)
    return train(model, optimizer, replicas, replica, handle)


def silent_rank():
    """A rank whose forward pass never ran has nothing to say, and is scaled as the others are."""
    model = make_model()
    handle = distmuon.attach_qk_clip(model, tau=TAU, mesh=dist.group.WORLD)
    if dist.get_rank() == 0:
        model(input_ids=batch_of(0, 1, 0))
    handle.step()
    return {name: param.detach() for name, param in model.named_parameters()}, handle.metrics()


def collectives():
    """How many all-reduces the clip of all layers takes: with steps that are not recorded none."""
    from torch.distributed.tensor.debug import CommDebugMode

    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    handle = distmuon.attach_qk_clip(model, tau=TAU, every=2)
    counts = []
    for _ in range(3):
        model(input_ids=batch_of(0, 1, 0))
        for module in (*model.model.layers, model):
            module.reshard()
        with CommDebugMode() as mode:
            handle.step()
        counts.append({str(op): count for op, count in mode.get_comm_counts().items() if count})
    return counts


def plain_and_unknown():
    model = make_model()
    handle = distmuon.attach_qk_clip(model, tau=TAU)
    model(input_ids=batch_of(0, 1, 0))
    handle.step()


def mesh_of_the_optimizer():
    """Muon knows over which ranks DDP copies parameters, and so does an optimizer that was wrapped."""
    group, found = dist.group.WORLD, []
    for wrapped in (False, True):
        model = make_model()
        if wrapped:
            optimizer = distmuon.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-3), mesh=group)
        else:
            optimizer = distmuon.Muon(model, lr=1e-3, adjust_lr_fn="match_rms_adamw", mesh=group)
        assert optimizer.replica_mesh is group
        handle = distmuon.attach_qk_clip(model, optimizer, tau=TAU)
        if dist.get_rank() == 0:
            model(input_ids=batch_of(0, 1, 0))
        handle.step()
        found.append(handle.metrics())
    return found


def optimizers_of_shards():
    """One that was made before the model was sharded, and one of the shards while FSDP holds whole weights."""
    model = make_model()
    early = optimizer_of(model)
    fully_shard(model)
    optimizer = optimizer_of(model)
    try:
        distmuon.attach_qk_clip(model, early, tau=TAU)
        refused = ""
    except ValueError as error:
        refused = str(error)
    model(input_ids=batch_of(0, 1, 0))
    whole = not isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    return refused, whole, distmuon.attach_qk_clip(model, optimizer, tau=TAU).layers
