"""What ``distmuon plan`` shows is what the optimizer does on real ranks."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from harness import Pool, run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

import distmuon
from distmuon.numerics.costs import CostTable, Rates
from distmuon.planning.devices import find_device
from distmuon.planning.layouts import make_layout
from distmuon.planning.models import of_module
from distmuon.planning.specs import Setup, plan_of, specs_of
from distmuon.speeds import Link, Speeds

FREE = Link(0.0, 0.0, 0.0, 0.0)
SLOW = Link(0.0, exchange=1e-1, reduce=0.0, gather=0.0)
# products that take long, so that the matrices which dominate get teams
TABLE = CostTable("cpu-float32", "made up", (("rational", Rates(1e-9, 1e-3, 1e-3)),), Speeds(FREE, FREE))
CONFIG = LlamaConfig(
    hidden_size=24,
    intermediate_size=200,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
    tie_word_embeddings=False,
)


# of 24 + 8 + 8 rows four ranks store 10 each, which cuts blocks and heads
FUSED = Phi3Config(
    hidden_size=24,
    intermediate_size=100,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    vocab_size=64,
    pad_token_id=0,
    tie_word_embeddings=False,
)


def module(config=CONFIG):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def owners(plan):
    """By parameter and slab: the rank, and the size of the team."""
    return {
        (plan.parameters[a.parameter].name, a.first, a.part): (a.owner, a.parts)
        for bucket in plan.buckets
        for a in bucket.assignments
    }


def waves(plan):
    return [[(bucket.rows, bucket.cols, bucket.parts) for bucket in wave.buckets] for wave in plan.waves]


# a link that takes long, so that buckets are cut
CUT = dataclasses.replace(TABLE, speeds=Speeds(SLOW, SLOW))


def bound(kind, table, config=CONFIG, matrices=None):
    model = module(config)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (4,) if kind == "fsdp" else (2, 2))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = distmuon.Muon(model, lr=0.02, adamw_lr=0.01, cost_table=table, matrices=matrices)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    (part,) = optimizer._binding.parts
    dist.barrier()
    return owners(part.pipeline.plan), waves(part.pipeline.plan)


@pytest.mark.parametrize(("kind", "table"), [("fsdp", TABLE), ("ddp", TABLE), ("fsdp", CUT)])
def test_owners_teams_and_waves_are_those_of_the_optimizer(kind, table):
    setup = Setup(
        of_module("tiny", module()),
        make_layout(kind, 1, 4),
        dataclasses.replace(find_device("cpu"), table=table),
    )
    plan = plan_of(setup, specs_of(setup))
    assert {parts for _, parts in owners(plan).values()} >= {1, 2}
    # of four shapes, one of which is cut where that lets more overlap
    assert len(plan.buckets) == (5 if table is CUT else 4)
    for found in run_ranks(bound, 4, kind, table):
        assert found == (owners(plan), waves(plan))


def test_blocks_are_those_of_the_optimizer():
    with Pool(4) as pool:
        for kind, matrices, queries in [("fsdp", "auto", "0:24"), ("ddp", "heads", "0:24"), ("fsdp", "heads", "0:8")]:
            setup = Setup(
                of_module("tiny", module(FUSED), optim={"matrices": matrices}),
                make_layout(kind, 1, 4),
                dataclasses.replace(find_device("cpu"), table=TABLE),
            )
            plan = plan_of(setup, specs_of(setup))
            assert f"model.layers.1.self_attn.qkv_proj.weight[{queries}]" in {spec.name for spec in plan.parameters}
            for found in pool.run(bound, kind, TABLE, FUSED, matrices):
                assert found == (owners(plan), waves(plan))
