"""Steps of lmo groups and of cautious decay over ranks are steps on one process, whatever the layout."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import (
    LAYOUTS,
    SETTINGS,
    Twins,
    assert_same_bits,
    distribute,
    full,
    give_gradients,
    groups_of,
    kind_of,
    mesh_of,
    sharded_optimizer,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import distmuon

RATES = dict(lr=0.1, weight_decay=0.3, momentum=0.8)


class Whole:
    """One optimizer of this package over the whole parameters, by which those over ranks are judged."""

    def __init__(self, twins, groups, **settings):
        self.twins, self.optimizer = twins, distmuon.Muon(groups, **{**SETTINGS, **settings})

    def step(self):
        self.optimizer.step()

    def state(self, name):
        return self.optimizer.state.get(self.twins.whole[name], {})


# --- what ranks run


def cautious(layout, dtype):
    twins = LAYOUTS[layout](dtype)
    settings = dict(cautious_wd=True, weight_decay=1.5, adamw_weight_decay=2.5)
    optimizer, whole = sharded_optimizer(twins, **settings), Whole(twins, groups_of(twins.whole), **settings)
    for step in range(3):
        give_gradients(twins, step)
        optimizer.step()
        whole.step()
    assert_same_bits(twins, optimizer, whole)


def unit_groups(named, nesterov=False):
    """What is on AdamW elsewhere has an lmo: embeddings by columns, the norm's gain by signs, other vectors by RMS."""
    matrices = [group for group in groups_of(named) if group["use_muon"]]
    rest = {name: param for name, param in named.items() if kind_of(name, param) == "adamw"}
    lmos = {name: "bias_rms" for name in rest}
    lmos |= {name: "col_norm" for name in rest if rest[name].ndim == 2}
    lmos |= {"norm.weight": "sign"} if "norm.weight" in rest else {}
    keys = dict(use_muon=False, nesterov=nesterov, **RATES)
    units = [
        {"params": [(name, rest[name]) for name in rest if lmos[name] == lmo], "lmo": lmo, "transposed": flip, **keys}
        for lmo, flip in (("col_norm", True), ("bias_rms", False), ("sign", False))
    ]
    return [*matrices, *(group for group in units if group["params"])]


def units(layout, dtype=torch.float32, nesterov=False, missing=None):
    twins = LAYOUTS[layout](dtype)
    optimizer = distmuon.Muon(unit_groups(twins.ours, nesterov), **{**SETTINGS, **twins.options, **ddp_mesh(twins)})
    whole = Whole(twins, unit_groups(twins.whole, nesterov))
    for step in range(4):
        give_gradients(twins, step, missing and (lambda name, step=step: missing(name, step)))
        optimizer.step()
        whole.step()
        assert_same_bits(twins, optimizer, whole, f"step {step}")


def ddp_mesh(twins):
    return {"mesh": twins.model.process_group} if isinstance(twins.model, DistributedDataParallel) else {}


def units_without_gradients(layout):
    """Some ranks have no gradient of half of the parameters; nobody has one of the embedding in the third step."""

    def missing(name, step):
        if step == 2 and name == "embed.weight":
            return "all"
        return dist.get_rank() == step % 2 and len(name) % 2 == 0

    units(layout, missing=missing)


def units_of_some_ranks():
    """Two of four ranks share a vector; the others have nothing with an lmo, and enter the sum all the same."""
    twins, pair = Twins({}, {}), dist.get_rank() // 2
    distribute(twins, "matrix", (5, 4), mesh_of(4), [Shard(0)], torch.float32)
    if pair == 0:
        distribute(twins, "vector", (7,), mesh_of(2, 2)["inner"], [Shard(0)], torch.float32)
    else:
        mesh_of(2, 2)

    def groups(named):
        unit = dict(use_muon=False, lmo="bias_rms", **RATES)
        units = [{"params": [("vector", named["vector"])], **unit}] if "vector" in named else []
        return [{"params": [("matrix", named["matrix"])], "use_muon": True}, *units]

    optimizer, whole = distmuon.Muon(groups(twins.ours), **SETTINGS), Whole(twins, groups(twins.whole))
    for step in range(3):
        give_gradients(twins, step)
        optimizer.step()
        whole.step()
        assert_same_bits(twins, optimizer, whole, f"step {step}")


CUTS = {
    "rows": ("row_norm", (7, 6), {}, 1),
    "columns": ("col_norm", (7, 6), {}, 0),
    "embedding": ("col_norm", (7, 6), {"transposed": True}, 1),
    "kernel rows": ("row_norm", (5, 6, 3), {"flatten": True}, 1),
    "kernel columns": ("col_norm", (6, 5, 3), {"flatten": True}, 0),
    "stack": ("row_norm", (3, 7, 6), {}, 2),
    "vectors": ("bias_rms", (3, 6), {}, 1),
    "vector": ("bias_rms", (7,), {}, 0),
    "few": ("bias_rms", (1,), {}, 0),
    "signs": ("sign", (7, 6), {}, 1),
}
"""An oracle, a shape, how it is read, and an axis to cut that its norm runs over."""


def cut(placements_of, mesh_shape, dtype, nesterov):
    """Every oracle with its axis cut, beside uncut ones; sums of all are one all-reduce."""
    twins = Twins({}, {})
    distribute(twins, "matrix", (4, 4), mesh_of(*mesh_shape), [Shard(0)] * len(mesh_shape), dtype)
    for name, (_, shape, _, axis) in CUTS.items():
        distribute(twins, name, shape, mesh_of(*mesh_shape), placements_of(axis, len(shape)), dtype)

    def groups(named):
        keys = dict(use_muon=False, nesterov=nesterov, **RATES)
        units = [
            {"params": [(name, named[name])], "lmo": lmo, **reading, **keys}
            for name, (lmo, _, reading, _) in CUTS.items()
        ]
        return [{"params": [("matrix", named["matrix"])], "use_muon": True}, *units]

    optimizer, whole = distmuon.Muon(groups(twins.ours), **SETTINGS), Whole(twins, groups(twins.whole))
    calls = []
    reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64:
            calls.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    for step in range(3):
        give_gradients(twins, step)
        dist.all_reduce = counted
        try:
            optimizer.step()
        finally:
            dist.all_reduce = reduce
        whole.step()
        if dtype == torch.float64:
            for name, param in twins.ours.items():
                torch.testing.assert_close(full(param), twins.whole[name].detach(), rtol=0, atol=1e-13)
        else:
            assert_same_bits(twins, optimizer, whole, f"step {step}")
    return calls


def along(axis, ndim):
    return [Shard(axis)]


def across(axis, ndim):
    """On an axis that the norm does not run over, where there is one."""
    return [Shard(0 if axis else 1)] if ndim > 1 else [Replicate()]


def replicated_and_along(axis, ndim):
    return [Replicate(), Shard(axis)]


def both(axis, ndim):
    return [Shard((axis + 1) % ndim), Shard(axis)] if ndim > 1 else [Shard(axis), Replicate()]


def scion_over(layout, steps, folder=None, load=False):
    """A Scion in a layout beside a whole one, saved or loaded in between; weights and state at the end, whole."""
    twins = LAYOUTS[layout](torch.float32)
    settings = dict(lr=0.002, foreach=False)
    optimizer = distmuon.Scion(twins.model, **{**settings, **({"lr": 0.9, "momentum": 0.1} if load else {})})
    if load:
        model, state = get_state_dict(twins.model, optimizer)
        loaded = {"model": model, "optimizer": state}
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(twins.model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for step in steps:
        give_gradients(twins, step)
        optimizer.step()
        optimizer.zero_grad()
    if folder is not None and not load:
        model, state = get_state_dict(twins.model, optimizer)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    found = {name: full(param) for name, param in twins.ours.items()}
    found |= {f"{name}, average": full(optimizer.state[p]["momentum_buffer"]) for name, p in twins.ours.items()}
    kinds = {row.algorithm for row in optimizer.report().rows}
    assert kinds == {"muon", "col_norm", "bias_rms"}
    return found


# --- tests


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, "fsdp2 uneven"),
        (4, "fsdp2 few"),
        (4, "fsdp2 columns"),
        (4, "hsdp uneven"),
        (4, "tp x fsdp2"),
        (2, "tp"),
        (2, "ddp"),
        (4, "expert meshes"),
        (2, "plain beside"),
    ],
)
def test_units_have_the_bits_of_one_process(pools, world_size, layout, nesterov):
    pools(world_size, units, layout, nesterov=nesterov)


@pytest.mark.parametrize("layout", ["fsdp2 uneven", "fsdp2 columns", "expert meshes"])
def test_units_of_which_some_ranks_have_no_gradient(pools, layout):
    pools(4, units_without_gradients, layout)


def test_units_that_some_ranks_have_none_of(pools):
    pools(4, units_of_some_ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("world_size", "mesh", "placements", "reduces"),
    [
        (2, (2,), along, True),
        (4, (4,), along, True),
        (2, (2,), across, False),
        (4, (2, 2), replicated_and_along, True),
        (4, (2, 2), both, True),
    ],
)
def test_norms_are_those_of_whole_vectors(pools, world_size, mesh, placements, reduces, dtype):
    # what is summed in the one all-reduce of a step: of each cut oracle, of the whole parameter's vectors
    wanted = 7 + 6 + 7 + 5 + 15 + 21 + 3 + 1
    for calls in pools(world_size, cut, placements, mesh, dtype, True):
        assert len(calls) == (3 if reduces else 0), calls
        assert all(wanted <= count <= wanted + 1 for count in calls), calls


def test_a_checkpoint_goes_to_other_layouts(pools, tmp_path):
    reference = pools(2, scion_over, "ddp", range(4))[0]
    pools(4, scion_over, "fsdp2 uneven", range(2), tmp_path / "saved")
    for world_size, layout in ((2, "fsdp2 uneven"), (4, "hsdp uneven")):
        found = pools(world_size, scion_over, layout, range(2, 4), tmp_path / "saved", load=True)[0]
        for name, value in reference.items():
            assert torch.equal(found[name], value), f"{layout}: {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, "fsdp2 uneven"), (4, "fsdp2 few"), (4, "fsdp2 columns"), (4, "hsdp uneven"), (4, "tp x fsdp2"), (2, "ddp")],
)
def test_cautious_decay_has_the_bits_of_one_process(pools, world_size, layout, dtype):
    pools(world_size, cautious, layout, dtype)
