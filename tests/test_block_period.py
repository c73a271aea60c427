"""MuonBP on one process: whole matrices in every so many steps, blocks of their rows by themselves between.

The reference is torch.optim.Muon, in whole steps of the matrices and in the others of their blocks as parameters of
their own, which keep the momentum of the same elements; float64 where weights are stored transposed.
"""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distmuon
from distmuon.plan.blocks import blocks_of, row_blocks
from distmuon.plan.boxes import Box, chunk
from distmuon.plan.reading import Reading

SETTINGS = dict(lr=0.02, weight_decay=0.1, momentum=0.9)

# By name: shape, keys of its reading, and the pieces of 4 parts of its rows by hand, as (first, end)
CASES = {
    "even": ((8, 6), {}, [(0, 2), (2, 4), (4, 6), (6, 8)]),
    "uneven": ((11, 6), {}, [(0, 3), (3, 6), (6, 9), (9, 11)]),
    "short": ((9, 6), {}, [(0, 3), (3, 6), (6, 9)]),
    "qkv": ((24, 6), {"split_sizes": (16, 4, 4)}, [(0, 6), (6, 12), (12, 16), (16, 18), (18, 20), (20, 24)]),
    "heads": ((24, 6), {"num_heads": 6}, [(0, 4), (4, 6), (6, 8), (8, 12), (12, 16), (16, 18), (18, 20), (20, 24)]),
    "whole_heads": ((24, 6), {"num_heads": 8}, [(at, at + 3) for at in range(0, 24, 3)]),
    "experts": ((3, 8, 6), {"flatten": False}, [(0, 2), (2, 4), (4, 6), (6, 8)]),
    "kernel": ((8, 4, 3), {"flatten": True}, [(0, 2), (2, 4), (4, 6), (6, 8)]),
}


def separate(tensor, pieces, reading):
    """Blocks of a whole parameter, each a contiguous matrix of output x input features."""
    logical = tensor.flatten(1) if reading.get("flatten") else tensor
    logical = logical.mT if reading.get("transposed") else logical
    return [m.contiguous() for a, b in pieces for m in (logical[..., a:b, :].reshape(-1, b - a, logical.shape[-1]))]


def matrices_of(name):
    """The declared matrices of a case, as pieces."""
    shape, reading, _ = CASES[name]
    rows = shape[1] if name == "experts" else shape[0]
    sizes = reading.get("split_sizes") or [rows // reading.get("num_heads", 1)] * reading.get("num_heads", 1)
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


class Reference:
    """A parameter by torch.optim.Muon, its momentum and weights whole between steps."""

    def __init__(self, param, name, *, make, period, ratio=1.0, **settings):
        self.param, self.reading, self.period, self.ratio = param.detach().clone(), CASES[name][1], period, ratio
        self.whole, self.blocks = matrices_of(name), CASES[name][2]
        self.momentum = torch.zeros_like(self.param)
        self.make, self.settings, self.count = make, settings, 0

    def step(self, grad):
        between = self.count % self.period != 0
        self.count += 1
        pieces = self.blocks if between else self.whole
        kept = [separate(tensor, pieces, self.reading) for tensor in (self.param, grad, self.momentum)]
        params = [nn.Parameter(weight) for weight in kept[0]]
        lr = self.settings["lr"]
        settings = {**self.settings, "lr": lr * self.ratio if between else lr}
        # the decay is that of the group's own rate, whatever the update has
        if between and self.ratio != 1.0:
            settings["weight_decay"] = settings["weight_decay"] / self.ratio
        muon = self.make(params, **settings)
        for param, piece, buffer in zip(params, kept[1], kept[2], strict=True):
            param.grad = piece
            muon.state[param]["momentum_buffer"] = buffer
        muon.step()
        self.put(self.param, pieces, [p.detach() for p in params])
        self.put(self.momentum, pieces, [muon.state[param]["momentum_buffer"] for param in params])

    def put(self, tensor, pieces, matrices):
        logical = tensor.flatten(1) if self.reading.get("flatten") else tensor
        logical = logical.mT if self.reading.get("transposed") else logical
        each = iter(matrices)
        for a, b in pieces:
            place = logical[..., a:b, :]
            for matrix in place if place.ndim == 3 else [place]:
                matrix.copy_(next(each))
        if self.reading.get("flatten"):
            tensor.copy_(logical.view_as(tensor))


def built(names, **settings):
    torch.manual_seed(1)
    params = {name: nn.Parameter(torch.randn(CASES[name][0])) for name in names}
    groups = [{"params": [(name, params[name])], "use_muon": True, **CASES[name][1]} for name in names]
    return params, distmuon.Muon(groups, **{**SETTINGS, "foreach": False, "blocks": 4, **settings})


def grads_of(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(param.shape, generator=generator) for name, param in params.items()}


def run(params, optimizer, steps, first=0):
    for step in range(first, first + steps):
        for name, grad in grads_of(params, step).items():
            params[name].grad = grad.clone()
        optimizer.step()


# --- the update


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("period", [1, 2, 5])
def test_update_is_that_of_torch_on_separate_blocks(period, scale):
    params, optimizer = built(CASES, block_period=period, adjust_lr_fn=scale, ns_coefficients="quintic")
    settings = {**SETTINGS, "adjust_lr_fn": scale}
    wanted = {name: Reference(params[name], name, make=torch.optim.Muon, period=period, **settings) for name in CASES}
    for step in range(7):
        run(params, optimizer, 1, step)
        for name, grad in grads_of(params, step).items():
            wanted[name].step(grad)
            assert torch.equal(params[name], wanted[name].param), (step, name)
            momentum = optimizer.state[params[name]]["momentum_buffer"]
            assert torch.equal(momentum, wanted[name].momentum), (step, name)


def test_transposed_weights_are_cut_along_output_features(monkeypatch):
    """Stored (in, out), so that blocks are columns of the storage; products sum in another order, so in float64."""
    reading = {"transposed": True}
    monkeypatch.setitem(CASES, "t", ((6, 11), reading, [(0, 3), (3, 6), (6, 9), (9, 11)]))
    params = {"t": nn.Parameter(torch.randn(6, 11))}
    options = dict(foreach=False, ns_dtype=torch.float64)
    group = {"params": [("t", params["t"])], "use_muon": True, **reading}
    optimizer = distmuon.Muon([group], **SETTINGS, **options, blocks=4, block_period=2)

    def make(params, **settings):
        return distmuon.Muon([{"params": params, "use_muon": True}], **settings, **options)

    wanted = Reference(params["t"], "t", make=make, period=2, **SETTINGS)
    wanted.whole = [(0, 11)]
    for step in range(4):
        run(params, optimizer, 1, step)
        wanted.step(grads_of(params, step)["t"])
        torch.testing.assert_close(params["t"], wanted.param, rtol=0, atol=1e-6)
        assert torch.equal(optimizer.state[params["t"]]["momentum_buffer"], wanted.momentum)


def test_batched_steps_are_those_of_single_blocks():
    (plain, one), (batched, many) = (
        built(CASES, block_period=3, foreach=foreach, ns_coefficients="quintic") for foreach in (False, None)
    )
    run(plain, one, 5)
    run(batched, many, 5)
    for name in CASES:
        torch.testing.assert_close(batched[name], plain[name], rtol=0, atol=2e-2)
        assert not torch.equal(batched[name], built([name])[0][name])


def test_ratio_is_of_the_rate_of_block_steps_alone():
    """The decay stays that of ``lr``, as the step between must not forget faster than a whole one."""
    params, optimizer = built(CASES, block_period=2, block_lr_ratio=0.5, ns_coefficients="quintic")
    make = torch.optim.Muon
    wanted = {name: Reference(params[name], name, make=make, period=2, ratio=0.5, **SETTINGS) for name in CASES}
    for step in range(4):
        run(params, optimizer, 1, step)
        for name, grad in grads_of(params, step).items():
            wanted[name].step(grad)
            torch.testing.assert_close(params[name], wanted[name].param, rtol=0, atol=1e-6)


def test_groups_have_periods_of_their_own():
    """Each as it is alone; nothing of it changes a group beside that has none."""
    periods = {"even": 1, "uneven": 2, "qkv": 3, "experts": 5}
    params, _ = built(periods)
    alone = {name: built([name], block_period=period) for name, period in periods.items()}
    groups = [
        {"params": [(name, param)], "use_muon": True, "block_period": periods[name], "blocks": 4, **CASES[name][1]}
        for name, param in params.items()
    ]
    together = distmuon.Muon(groups, **SETTINGS, foreach=False)
    for name, (apart, _) in alone.items():
        with torch.no_grad():
            apart[name].copy_(params[name])
    for step in range(11):
        run(params, together, 1, step)
        for name, (apart, optimizer) in alone.items():
            apart[name].grad = params[name].grad.clone()
            optimizer.step()
            assert torch.equal(params[name], apart[name]), (step, name)
    assert [group["block_step"] for group in together.param_groups] == [0, 11, 11, 11]


# --- the counter


def test_counter_counts_steps_that_are_made():
    params, optimizer = built(["even"], block_period=3, on_nonfinite="skip")
    group = optimizer.param_groups[0]
    run(params, optimizer, 2)
    assert group["block_step"] == 2
    params["even"].grad = torch.full((8, 6), float("nan"))
    optimizer.step()
    assert (group["block_step"], optimizer.skipped_steps) == (2, 1)
    lr, group["lr"] = group["lr"], 0.0
    params["even"].grad = torch.zeros(8, 6)
    optimizer.step()  # the dummy step by which DCP makes state
    assert group["block_step"] == 2
    group["lr"] = lr
    run(params, optimizer, 1)
    assert group["block_step"] == 3


@pytest.mark.parametrize("way", ["load", "deepcopy", "convert"])
def test_resumed_run_goes_on_in_phase(way):
    names = ["even", "uneven"]
    params, optimizer = built(names, block_period=3)
    run(params, optimizer, 4)
    if way == "deepcopy":
        other, second = copy.deepcopy((params, optimizer))
    else:
        other, second = built(names, block_period=3)
        for name in names:
            other[name].data.copy_(params[name])
        saved = copy.deepcopy(optimizer.state_dict())
        if way == "convert":
            saved = distmuon.checkpoint.convert(saved, target="distmuon", names=names)
        second.load_state_dict(saved)
    assert second.param_groups[0]["block_step"] == 4
    run(params, optimizer, 5, 4)
    run(other, second, 5, 4)
    assert all(torch.equal(params[name], other[name]) for name in names)


def test_state_from_before_there_was_a_counter_begins_a_period():
    params, optimizer = built(["even"], block_period=3)
    run(params, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["block_step"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["block_step"] == 0


def test_period_may_change_between_steps():
    """As a whole step each once the period is 1 again."""
    params, optimizer = built(["even"], block_period=4)
    run(params, optimizer, 2)
    other, plain = built(["even"])
    other["even"].data.copy_(params["even"])
    optimizer.param_groups[0]["block_period"] = 1
    state = copy.deepcopy(optimizer.state_dict())
    plain.load_state_dict(state)
    run(params, optimizer, 2, 2)
    run(other, plain, 2, 2)
    assert torch.equal(params["even"], other["even"])
    assert optimizer.param_groups[0]["block_step"] == 2


def test_wrapped_optimizer():
    model, whole = (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    options = dict(block_period=2, blocks=2, foreach=False, adjust_lr_fn="match_rms_adamw")
    routes = dict(adamw_names=["*.bias"], muon_names=["*.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        wrapped = distmuon.wrap(model, adamw, **options, **routes)
        plain = distmuon.Muon(whole, lr=1e-3, **options, **routes)
    for step in range(3):
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(step))
            theirs.grad = ours.grad.clone()
        wrapped.step()
        plain.step()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert wrapped.state_dict()["param_groups"][0]["block_step"] == 3
    wrapped.load_state_dict(wrapped.state_dict())
    assert wrapped.param_groups[0]["block_step"] == 3


# --- what is told


def test_report_tells_periods():
    _, optimizer = built(["uneven", "experts"], block_period=5)
    rows = {row.name: row.matrices for row in optimizer.report().rows}
    assert rows["uneven"] == "11 x 6; in 4 of 5 steps 3 of 3 x 6 + 2 x 6"
    assert rows["experts"] == "3 of 8 x 6; in 4 of 5 steps 12 of 2 x 6"
    assert [row.matrices for row in built(["uneven"])[1].report().rows] == ["11 x 6"]


def test_stats_are_of_the_last_step():
    params, optimizer = built(["uneven"], block_period=2, step_stats=True, bucket_bytes=float("inf"))
    found = []
    for step in range(3):
        run(params, optimizer, 1, step)
        found.append(optimizer.last_step_stats()["optim/buckets"])
    assert found == [1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("shape", "keys", "message"),
    [
        ((10, 6), {}, r"'w' of shape \(10, 6\) has 10 output features, and blocks=4 leaves feature 9 alone"),
        ((4, 6), {}, r"'w' of shape \(4, 6\) has 4 output features.*pass fewer blocks"),
        ((24, 6), {"split_sizes": (13, 11)}, r"leaves feature 12 alone in a block: pass fewer blocks"),
        (
            (8, 24),
            {"num_heads": 4, "split_axis": "cols"},
            r"'w' .*split_axis='cols'.*'whole'.* a group with block_period=1",
        ),
        ((8, 6), {"block_step": -1}, r"block_step=-1: it is a whole number of 0 or more"),
        ((8, 6), {"block_step": 1.0}, r"block_step=1.0"),
    ],
)
def test_what_cannot_be_cut_is_refused(shape, keys, message):
    group = {"params": [("w", nn.Parameter(torch.randn(shape)))], "use_muon": True, **keys}
    with pytest.raises(ValueError, match=message):
        distmuon.Muon([group], block_period=2, blocks=4)


def test_a_matrix_of_one_row_is_not_cut():
    """Nothing is cut off of it, so it is as whole as ever."""
    (block,) = row_blocks("w", (1, 6), Reading(), 4)
    assert block.shape == (1, 6)


# --- blocks


@st.composite
def cuttable(draw):
    shape = draw(st.sampled_from([(24, 5), (30, 5), (3, 24, 5)]))
    transposed = draw(st.booleans())
    rows = shape[-2]
    shape = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    kind = draw(st.sampled_from(["whole", "split", "heads", "turns"]))
    half = rows // 2
    keys = {
        "whole": {},
        "split": {"split_sizes": (half, rows - half)},
        "heads": {"split_sizes": (half, rows - half), "num_heads": (3, None)},
        "turns": {"split_sizes": (half, half), "interleaved": True},
    }[kind]
    return shape, Reading(transposed=transposed, **keys), draw(st.integers(1, 4))


@given(cuttable())
def test_blocks_hold_each_element_once_in_one_part_and_one_matrix(case):
    shape, reading, count = case
    try:
        blocks = row_blocks("w", shape, reading, count)
    except ValueError:
        return
    axis = len(shape) - (1 if reading.transposed else 2)
    whole = Box.whole(shape)
    numbers = {}
    for what, found in (("block", blocks), ("matrix", blocks_of("w", shape, reading))):
        marks = numbers[what] = torch.full(shape, -1)
        mark = 0
        for block in found:
            place = marks if block.cut is None else marks[block.cut.index(whole)]
            head = block.cut.head if block.cut is not None else 0
            for at in range(0, place.shape[axis], head or place.shape[axis]):
                piece = place.narrow(axis, at, head or place.shape[axis])
                assert (piece == -1).all()
                piece.fill_(mark)
                mark += 1
            rows = place.numel() // (place.shape[0] if len(shape) == 3 else 1) // 5
            assert (head or rows) == block.matrices.logical[0]
        assert (marks >= 0).all()
    part = torch.full(shape, -1)
    for number in range(count):
        start, size = chunk(shape[axis], number, count)
        part.narrow(axis, start, size).fill_(number)
    for mark in numbers["block"].unique():
        inside = numbers["block"] == mark
        assert len(part[inside].unique()) == 1
        assert len(numbers["matrix"][inside].unique()) == 1
    # nothing is cut that need not be
    assert len(numbers["block"].unique()) == len(torch.stack([part, numbers["matrix"]]).flatten(1).unique(dim=1).T)
