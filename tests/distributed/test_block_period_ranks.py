"""MuonBP on several ranks: the bits of one process, and nothing sent between whole steps where blocks lie whole."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import rank_errors
from layouts import full, give_gradients, mesh_of
from test_blocks import fsdp, placed, replicated
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import distmuon
from distmuon.numerics.costs import CostTable, Rates
from distmuon.speeds import Link, Speeds

# By name: shape and keys of its group. Four parts of the rows are even, uneven, or three alone
PARAMETERS = {
    "even": ((16, 8), {}),
    "uneven": ((11, 8), {}),
    "short": ((9, 8), {}),
    "wide": ((8, 24), {"block_period": 2, "block_lr_ratio": 0.5}),
    "always": ((12, 8), {"block_period": 1}),
    "qkv": ((24, 8), {"split_sizes": (12, 6, 6)}),
    "heads": ((24, 8), {"num_heads": 6}),
    "experts": ((5, 8, 6), {"flatten": False}),
    "kernel": ((8, 4, 3), {"flatten": True}),
    "normuon": ((11, 8), {"variant": "normuon"}),
    "adamuon": ((16, 8), {"variant": "adamuon"}),
}
WHOLE_SHARDS = {name: PARAMETERS[name] for name in ("even", "uneven", "short", "qkv", "kernel")}
SETTINGS = dict(lr=0.02, foreach=False, block_period=3, blocks=4)


LAYOUTS = {
    "fsdp 2": functools.partial(fsdp, (2,)),
    "fsdp 4": functools.partial(fsdp, (4,)),
    "hsdp": functools.partial(fsdp, (2, 2)),
    "hsdp, repeat": functools.partial(fsdp, (2, 2), replicas="repeat"),
    "ddp": replicated,
    "ddp, repeat": functools.partial(replicated, replicas="repeat"),
    "columns": functools.partial(placed, (-1,), (4,)),
    "rows x columns": functools.partial(placed, (0, -1), (2, 2)),
    "tensor parallel": functools.partial(placed, (None, 0), (2, 2)),
}
WHERE = [(2, "fsdp 2"), (2, "ddp")] + [(4, name) for name in LAYOUTS if name != "fsdp 2"]


def optimizer_of(named, parameters, **settings):
    groups = [{"params": [(name, named[name])], "use_muon": True, **keys} for name, (_, keys) in parameters.items()]
    return distmuon.Muon(groups, **{**SETTINGS, **settings})


def differences(twins, optimizer, reference, step):
    found = []
    for name, param in twins.ours.items():
        whole = twins.whole[name]
        if not torch.equal(full(param), whole):
            found.append(f"step {step}: {name}: {(full(param) - whole).abs().max()}")
        for key, wanted in reference.state[whole].items():
            if not torch.equal(full(optimizer.state[param][key]), wanted):
                found.append(f"step {step}: {key} of {name}")
    return found


# --- steps on ranks


def parity(layout, settings):
    """Seven steps of periods 1, 2 and 3, so that whole and block steps come in all combinations."""
    twins = LAYOUTS[layout](PARAMETERS)
    optimizer = optimizer_of(twins.ours, PARAMETERS, **twins.options, **settings)
    reference = optimizer_of(twins.whole, PARAMETERS, **settings)
    found = []
    for step in range(7):
        give_gradients(twins, step)
        optimizer.step()
        reference.step()
        found += differences(twins, optimizer, reference, step)
    counts = [group["block_step"] for group in optimizer.param_groups]
    return found, counts


def bytes_by_step(layout, parameters, steps):
    """What this rank sends in each step."""
    twins = LAYOUTS[layout](parameters)
    optimizer = optimizer_of(twins.ours, parameters, step_stats=True, **twins.options)
    sent = []
    for step in range(steps):
        give_gradients(twins, step)
        optimizer.step()
        sent.append(optimizer.last_step_stats()["optim/bytes_sent"])
    return sent


def plans_of(layout, parameters, **settings):
    """The plan of a whole step and that of the one after it, and what this rank sends."""
    twins = LAYOUTS[layout](parameters)
    optimizer = optimizer_of(twins.ours, parameters, **twins.options, **settings)
    plans, sent = [], []
    for step in range(2):
        give_gradients(twins, step)
        optimizer.step()
        (part,) = optimizer._binding.parts
        plans.append(part.latest.pipeline.plan)
        sent.append(part.latest.pipeline.bytes_sent)
    return plans, sent


def counts_of_blocks():
    plans, _ = plans_of("fsdp 4", WHOLE_SHARDS)
    return [len(plan.parameters) for plan in plans]


def teams_of_steps():
    """Products take ages and links nothing, and one rank has no block: a team of all would end sooner."""
    slow, free = Rates(1e-9, 1.0, 1.0), Link(0.0, 0.0, 0.0, 0.0)
    engines = tuple((name, slow) for name in ("rational", "composed", "gram"))
    table = CostTable("cpu-float32", "made up", engines, Speeds(free, free))
    short = {"short": PARAMETERS["short"]}
    plans, sent = plans_of("fsdp 4", short, foreach=None, ns_dtype=torch.float32, cost_table=table)
    return [max(bucket.parts for bucket in plan.buckets) for plan in plans], sent[1]


def one_rank_counts_otherwise(after, static):
    """Rank 1 is told another step than rank 0, before the first step or between two."""
    twins = LAYOUTS["fsdp 2"]({"even": PARAMETERS["even"]})
    optimizer = optimizer_of(twins.ours, {"even": ((16, 8), {"name": "hidden"})}, static_grads=static)
    for step in range(after + 1):
        if step == after and dist.get_rank() == 1:
            optimizer.param_groups[0]["block_step"] += 1
        give_gradients(twins, step)
        optimizer.step()


def one_rank_has_another_period():
    twins = LAYOUTS["fsdp 2"]({"even": PARAMETERS["even"]})
    optimizer = optimizer_of(twins.ours, {"even": PARAMETERS["even"]}, blocks=4 - 2 * dist.get_rank())
    give_gradients(twins, 0)
    optimizer.step()


def all_ranks_count_otherwise():
    """A counter that all ranks write alike is where all go on; with it the plan of the next step."""
    twins = LAYOUTS["fsdp 2"](PARAMETERS)
    optimizer = optimizer_of(twins.ours, PARAMETERS)
    reference = optimizer_of(twins.whole, PARAMETERS)
    found = []
    for step in range(4):
        if step == 2:
            for group in (*optimizer.param_groups, *reference.param_groups):
                group["block_step"] = 4
        give_gradients(twins, step)
        optimizer.step()
        reference.step()
        found += differences(twins, optimizer, reference, step)
    return found


def save(layout, folder):
    twins = LAYOUTS[layout](PARAMETERS)
    optimizer = optimizer_of(twins.ours, PARAMETERS, **twins.options)
    for step in range(4):
        give_gradients(twins, step)
        optimizer.step()
    model = {name: param.detach() for name, param in twins.ours.items()}
    dcp.save({"model": model, "optim": get_optimizer_state_dict(twins.model, optimizer)}, checkpoint_id=folder)


def load(layout, folder):
    """Go on after four steps in another layout, beside one process that made them all."""
    twins = LAYOUTS[layout](PARAMETERS)
    reference = optimizer_of(twins.whole, PARAMETERS)
    for step in range(4):
        give_gradients(twins, step)
        reference.step()
    for param in twins.ours.values():
        param.grad = None
    optimizer = optimizer_of(twins.ours, PARAMETERS, **twins.options)
    model = {name: param.detach() for name, param in twins.ours.items()}
    state = {"model": model, "optim": get_optimizer_state_dict(twins.model, optimizer)}
    assert optimizer.param_groups[0]["block_step"] == 0  # DCP's dummy step is none
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(twins.model, optimizer, state["optim"])
    found = [] if optimizer.param_groups[0]["block_step"] == 4 else ["the counter was not restored"]
    for step in range(4, 8):
        give_gradients(twins, step)
        optimizer.step()
        reference.step()
        found += differences(twins, optimizer, reference, step)
    return found


def skips():
    """A step that one rank's NaN leaves out moves no counter on any."""
    twins = LAYOUTS["fsdp 2"](PARAMETERS)
    optimizer = optimizer_of(twins.ours, PARAMETERS, on_nonfinite="skip")
    reference = optimizer_of(twins.whole, PARAMETERS)
    found = []
    for step in range(6):
        give_gradients(twins, step)
        if step % 2 and dist.get_rank() == 1:
            twins.ours["even"].grad.to_local().fill_(float("nan"))
        optimizer.step()
        if step % 2 == 0:
            reference.step()
        found += differences(twins, optimizer, reference, step)
    return found, [group["block_step"] for group in optimizer.param_groups][:1]


def hooked():
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)))
    group = {"params": list(model.module.named_parameters()), "use_muon": True, "name": "hidden"}
    optimizer = distmuon.Muon([group], mesh=mesh_of(2), **SETTINGS)
    with pytest.raises(ValueError, match=r"group 0 \(hidden\) has a block_period.*leave the hook out"):
        distmuon.ddp_hook(optimizer, None)


# --- tests


@pytest.mark.parametrize(("world_size", "layout"), WHERE)
def test_update_is_that_of_one_process(pools, world_size, layout):
    for found, counts in pools(world_size, parity, layout, {}):
        assert not found
        assert counts == [7, 7, 7, 7, 0, 7, 7, 7, 7, 7, 7]


@pytest.mark.parametrize(
    "settings", [{"bucket_bytes": 1}, {"static_grads": True}, {"verify_exchange": True}, {"teams": False}]
)
def test_settings_change_nothing(pools, settings):
    for found, _ in pools(4, parity, "fsdp 4", settings):
        assert not found


def test_between_whole_steps_nothing_is_sent_where_blocks_lie_whole(pools):
    """Four blocks on four ranks, and on two where shards are of whole blocks; 9 rows are in 3 of 3, or 5 and 4."""
    for world_size, layout in [(4, "fsdp 4"), (2, "fsdp 2"), (4, "hsdp, repeat"), (2, "ddp, repeat")]:
        parameters = {name: known for name, known in WHOLE_SHARDS.items() if name != "short" or layout == "fsdp 4"}
        found = pools(world_size, bytes_by_step, layout, parameters, 6)
        by_step = [sum(sent) for sent in zip(*found, strict=True)]
        assert [by_step[step] for step in (1, 2, 4, 5)] == [0.0] * 4, (layout, by_step)
        assert layout == "ddp, repeat" or min(by_step[0], by_step[3]) > 0, (layout, by_step)
    for sent in pools(4, bytes_by_step, "columns", WHOLE_SHARDS, 2):
        assert min(sent) > 0  # shards of columns hold no block


def test_uneven_rows_are_cut_as_shards_are(pools):
    counts = pools(4, counts_of_blocks)[0]
    # even: a stack of blocks; 11 and 9 rows: 4 and 3; q | k | v of 12, 6, 6 rows on 4 parts of 6: 4; kernel: 4
    assert counts == [7, 1 + 4 + 3 + 4 + 4]


def test_teams_own_whole_matrices_alone(pools):
    for parts, sent in pools(4, teams_of_steps):
        assert parts == [2, 1] and sent == 0


@pytest.mark.parametrize("after", [0, 2])
def test_counters_that_differ_are_told_on_all_ranks(after):
    errors = rank_errors(one_rank_counts_otherwise, 2, after, False)
    for error in errors.values():
        assert "ValueError" in error and "group 0 (hidden)" in error
        assert f"block_step={after} of block_period=3 on ranks [0]" in error
        assert f"block_step={after + 1} of block_period=3 on ranks [1]" in error
        assert "load the same state dict on every rank" in error


def test_counters_that_differ_at_the_start_are_told_with_static_grads():
    for error in rank_errors(one_rank_counts_otherwise, 2, 0, True).values():
        assert "block_step=1 of block_period=3 on ranks [1]" in error


def test_blocks_that_differ_are_told_on_all_ranks():
    for error in rank_errors(one_rank_has_another_period, 2).values():
        assert "'even' has the settings" in error and "blocks=4" in error and "blocks=2" in error


def test_counters_that_all_ranks_write(pools):
    assert pools(2, all_ranks_count_otherwise) == [[], []]


@pytest.mark.parametrize(("source", "target"), [((2, "fsdp 2"), (4, "hsdp")), ((4, "fsdp 4"), (2, "ddp"))])
def test_checkpoint_goes_on_in_phase_on_other_ranks(pools, tmp_path, source, target):
    pools(*source[:1], save, source[1], str(tmp_path))
    assert pools(target[0], load, target[1], str(tmp_path)) == [[]] * target[0]


def test_steps_that_are_left_out_do_not_count(pools):
    for found, counts in pools(2, skips):
        assert (found, counts) == ([], [3])


def test_ddp_hook_is_refused(pools):
    pools(2, hooked)
