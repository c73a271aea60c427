"""Stages of a pipeline, each sharded over ranks of its own: one norm, one decision to skip, and no wait for others."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy

import distmuon
from tests.distributed.harness import Pool

STEPS, BATCH, MAX_NORM = 3, 8, 0.2
# What each of the two stages holds; without blocks in the last one it has nothing for Muon
SPLITS = {"blocks in both": 1, "no matrix in the last": 2}


@pytest.fixture(scope="module")
def pool():
    with Pool(4) as pool:
        yield pool


class Stage(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


class Whole(nn.Module):
    """The stages one after another, as parts of one model."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x):
        return self.last(self.first(x))


def cut(blocks):
    """The two stages, of which the first has so many blocks."""
    torch.manual_seed(0)
    first = {"embed": nn.Embedding(16, 8), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
    last = {"norm": nn.LayerNorm(8), "head": nn.Linear(8, 16)}
    if blocks == 1:
        last = {"down": first.pop("down"), **last}
    return Stage(first).double(), Stage(last).double()


def muon(params, **options):
    return distmuon.Muon(params, lr=0.05, adamw_lr=0.01, ns_dtype=torch.float64, on_nonfinite="skip", **options)


def loss_of(output, target):
    return cross_entropy(output.flatten(0, -2), target.flatten())


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, 16, (BATCH, 3), generator=generator) for _ in range(2)]


class Run:
    """One stage on this rank."""

    def __init__(self, split, schedule=ScheduleGPipe):
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        self.place = self.mesh["pp"].get_local_rank()
        self.model = fully_shard(cut(split)[self.place], mesh=self.mesh["dp"])
        self.optimizer = muon(self.model, stages=self.mesh["pp"])
        stage = PipelineStage(self.model, self.place, 2, torch.device("cpu"), group=self.mesh["pp"].get_group())
        self.schedule = schedule(stage, n_microbatches=2, loss_fn=loss_of)

    def backward(self, step):
        x, target = (half.chunk(2)[self.mesh["dp"].get_local_rank()] for half in batch(step))
        if self.place == 0:
            self.schedule.step(x)
        else:
            self.schedule.step(target=target)

    def step(self, step, stain=lambda: None):
        self.backward(step)
        stain()
        norm = distmuon.clip_grad_norm_(self.model, MAX_NORM, keep_nonfinite=True, stages=self.mesh["pp"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def whole(self):
        return {name: param.full_tensor() for name, param in self.model.named_parameters()}


def undisturbed(split, skipped=()):
    """One process that trains all stages as one model."""
    model = Whole(*cut(split))
    optimizer = muon(model)
    norms = []
    for step in range(STEPS):
        x, target = batch(step)
        loss_of(model(x), target).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        if step not in skipped:
            optimizer.step()
        optimizer.zero_grad()
    return model, norms


def pipelined(split, schedule):
    run = Run(split, schedule)
    norms = [run.step(step) for step in range(STEPS)]
    model, wanted = undisturbed(split)
    torch.testing.assert_close(torch.stack(norms), torch.stack(wanted))
    stage = dict((model.first, model.last)[run.place].named_parameters())
    for name, param in run.whole().items():
        torch.testing.assert_close(param, stage[name].detach())
    # each stage talks to its own ranks alone
    ranks = {tuple(part.pipeline.plan.ranks) for part in run.optimizer._binding.parts}
    assert ranks == {tuple(run.mesh["dp"].mesh.tolist())}
    # a checkpoint of a stage, by torch's functions
    parameters, states = copy.deepcopy(get_state_dict(run.model, run.optimizer))
    again = Run(split, schedule)
    set_state_dict(again.model, again.optimizer, model_state_dict=parameters, optim_state_dict=states)
    for one in (run, again):
        one.step(STEPS)
    theirs = again.whole()
    assert all(torch.equal(param, theirs[name]) for name, param in run.whole().items())
    return sum(group["use_muon"] for group in run.optimizer.param_groups)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_sharded_pipeline_trains_as_one_process(pool, split, schedule):
    muon_groups = pool.run(pipelined, split, schedule)
    assert muon_groups == ([1, 1, 0, 0] if split == 2 else [1, 1, 1, 1])


def interleaved(skip):
    """Ranks that hold two stages each, with one optimizer of the named parameters of both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    place, group = mesh["pp"].get_local_rank(), mesh["pp"].get_group()
    layers = [layer for stage in cut(2) for layer in stage.layers.items()]
    chunks = [Stage(dict(part)).double() for part in (layers[:1], layers[1:2], layers[2:3], layers[3:])]
    mine = {number: fully_shard(chunks[number], mesh=mesh["dp"]) for number in (place, place + 2)}
    stages = [PipelineStage(chunk, number, 4, torch.device("cpu"), group=group) for number, chunk in mine.items()]
    schedule = ScheduleInterleaved1F1B(stages, n_microbatches=2, loss_fn=loss_of)
    named = [pair for chunk in mine.values() for pair in chunk.named_parameters()]
    optimizer = muon(named, stages=mesh["pp"])
    for step in range(STEPS):
        x, target = (half.chunk(2)[mesh["dp"].get_local_rank()] for half in batch(step))
        schedule.step(*([x] if place == 0 else []), target=target if place == 1 else None)
        if step == skip and torch.distributed.get_rank() == 2:
            named[0][1].grad.to_local().fill_(torch.nan)
        distmuon.clip_grad_norm_([param for _, param in named], MAX_NORM, keep_nonfinite=True, stages=mesh["pp"])
        optimizer.step()
        optimizer.zero_grad()
    model, _ = undisturbed(2, skipped=(skip,))
    wanted = dict([*model.first.named_parameters(), *model.last.named_parameters()])
    for name, param in named:
        torch.testing.assert_close(param.full_tensor(), wanted[name].detach())


def test_ranks_with_two_stages_have_one_optimizer(pool):
    pool.run(interleaved, 1)


def skipped(split):
    run = Run(split)

    def stain():
        # one rank of one stage, in one step
        if torch.distributed.get_rank() == 3:
            run.model.layers.norm.weight.grad.to_local().fill_(torch.nan)

    norms = [run.step(step, stain if step == 1 else lambda: None) for step in range(STEPS)]
    assert run.optimizer.skipped_steps == 1 and norms[1].isnan()
    model, _ = undisturbed(split, skipped=(1,))
    stage = dict((model.first, model.last)[run.place].named_parameters())
    for name, param in run.whole().items():
        torch.testing.assert_close(param, stage[name].detach())


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_all_stages_leave_a_step_out_or_none(pool, split):
    pool.run(skipped, split)


def fails(kind):
    run = Run(1)
    run.backward(0)
    norm = run.model.layers.norm if run.place else None
    if torch.distributed.get_rank() == 3:
        if kind == "nonfinite":
            norm.weight.grad.to_local().fill_(torch.inf)
        else:
            norm.weight.grad = torch.zeros(8, dtype=torch.float64)
    options = {"lr": 0.1, "adamw_lr": 0.1, "stages": run.mesh["pp"]}
    optimizer = distmuon.Muon(run.model, on_nonfinite="raise", **options)
    before = run.whole()
    try:
        optimizer.step()
    except Exception as error:
        unchanged = all(torch.equal(param, before[name]) for name, param in run.whole().items())
        return type(error).__name__, str(error), unchanged
    return "nothing", "", True


@pytest.mark.parametrize(("kind", "error"), [("nonfinite", "NonfiniteError"), ("plain", "TypeError")])
def test_what_one_stage_finds_is_raised_on_all(pool, kind, error):
    results = pool.run(fails, kind)
    assert all(result == results[0] for result in results)
    name, text, unchanged = results[0]
    assert name == error and unchanged
    assert "'layers.norm.weight'" in text and text.count("rank 3") == 1


def norms_of_orders():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh["pp"].get_local_rank()
    whole = [torch.arange(1.0, 7.0), torch.arange(-9.0, -1.0)]
    for order in (2.0, 1.0, torch.inf):
        for sharded in (False, True):
            model = nn.Module()
            model.weight = nn.Parameter(torch.zeros_like(whole[stage]))
            if sharded:
                fully_shard(model, mesh=mesh["dp"])
                model.weight.grad = distribute_tensor(whole[stage], mesh["dp"], [Shard(0)])
            else:
                model.weight.grad = whole[stage].clone()
            norm = distmuon.clip_grad_norm_(model, 1.0, order, stages=mesh["pp"].get_group())
            wanted = torch.linalg.vector_norm(torch.cat(whole), order)
            torch.testing.assert_close(norm, wanted)
            grad = model.weight.grad.full_tensor() if sharded else model.weight.grad
            torch.testing.assert_close(grad, whole[stage] / wanted, atol=1e-5, rtol=1e-5)
    # a stage that has no gradients at all
    norm = distmuon.clip_grad_norm_([nn.Parameter(torch.ones(2))] if stage else [model.weight], 1.0, stages=mesh["pp"])
    return norm


def test_norms_of_any_order_over_stages(pool):
    norms = pool.run(norms_of_orders)
    assert all(torch.equal(norm, norms[0]) for norm in norms)


def on_the_wrong_axis():
    run = Run(1)
    run.backward(0)
    optimizer = distmuon.Muon(run.model, lr=0.1, adamw_lr=0.1, stages=run.mesh["dp"], on_nonfinite="skip")
    with pytest.raises(ValueError, match=r"stages is of ranks \[\d, \d\], and ranks .* share parameters.*mesh\['pp'\]"):
        optimizer.step()


def test_an_axis_that_shares_parameters_is_no_axis_of_stages(pool):
    pool.run(on_the_wrong_axis)


def heads_of_sequentials():
    """What takes the last Linear of a Sequential, with stages and without, by a Muon and by a wrapped AdamW."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    found = []
    for options in ({}, {"stages": mesh["pp"]}):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        reports = [distmuon.Muon(model, lr=0.05, adamw_lr=0.01, **options).report()]
        reports.append(distmuon.wrap(model, torch.optim.AdamW(model.parameters()), lr=0.05, **options).report())
        found.append([{row.name: row.algorithm for row in report.rows}["2.weight"] for report in reports])
    return mesh["pp"].get_local_rank(), found


def test_a_sequential_stage_ends_in_a_head_on_the_last_rank_alone(pool):
    for place, (alone, staged) in pool.run(heads_of_sequentials):
        assert alone == ["adamw", "AdamW"]
        assert staged == (alone if place else ["muon", "muon"])
