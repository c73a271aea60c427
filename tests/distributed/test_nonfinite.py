"""NaN and infinities in gradients: told or left out on all ranks alike, before anything is updated."""

import copy
import logging
import pickle
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distmuon
from distmuon.comm.agree import NonfiniteError, agree
from distmuon.numerics.finite import nonfinite

SETTINGS = {"lr": 0.02, "adamw_lr": 1e-3}


@pytest.fixture(scope="module")
def two():
    with Pool(2) as pool:
        yield pool


class Model(nn.Module):
    """Two matrices on Muon, an embedding and a norm on AdamW."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 10, bias=False)
        self.second = nn.Linear(10, 6, bias=False)
        self.norm = nn.LayerNorm(6)


def model_in(layout):
    torch.manual_seed(0)
    model = Model()
    if layout == "fsdp":
        fully_shard(model)
    return model


def optimizer_in(layout, model, **keywords):
    mesh = dist.group.WORLD if layout == "replicated" else None
    return distmuon.Muon(model, mesh=mesh, **{**SETTINGS, **keywords})


def set_gradients(model, step):
    torch.manual_seed(step)
    for param in model.parameters():
        whole = torch.randn(param.shape)
        if type(param) is nn.Parameter:
            param.grad = whole
        else:
            from torch.distributed.tensor import distribute_tensor

            param.grad = distribute_tensor(whole, param.device_mesh, param.placements)


def stain(param, value):
    """One bad element of what this rank stores."""
    grad = param.grad
    local = grad.to_local() if hasattr(grad, "to_local") else grad
    local.view(-1)[local.numel() // 2] = value


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def all_of(model, optimizer):
    """What a step changes, as this rank stores it."""
    state = [value for param in model.parameters() for value in optimizer.state[param].values()]
    tensors = [*model.parameters(), *state]
    return [getattr(tensor, "to_local", lambda kept=tensor: kept)().detach().clone() for tensor in tensors]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def stained_run(layout, on, names, value, keywords):
    """Three steps, the second of which is bad on the ranks ``on``; what is told, and whether it left a trace."""
    model, twin = model_in(layout), model_in(layout)
    optimizer, undisturbed = optimizer_in(layout, model, **keywords), optimizer_in(layout, twin, **keywords)
    told, untouched = "", False
    for step in range(3):
        set_gradients(model, step)
        set_gradients(twin, step)
        if step != 1:
            optimizer.step()
            undisturbed.step()
            continue
        if rank() in on:
            for name in names:
                stain(model.get_parameter(name), value)
        before = all_of(model, optimizer)
        try:
            optimizer.step()
        except FloatingPointError as error:
            told = str(error)
        untouched = same(before, all_of(model, optimizer))
    return told, untouched, same(all_of(model, optimizer), all_of(twin, undisturbed)), optimizer.skipped_steps


@pytest.mark.parametrize("layout", ["fsdp", "replicated"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["first.weight", "embed.weight", "norm.bias"])
def test_a_bad_gradient_of_one_rank_is_raised_on_all(two, layout, value, name):
    for told, untouched, unmarked, skipped in two.run(
        stained_run, layout, [1], [name], value, {"on_nonfinite": "raise"}
    ):
        assert told.startswith(f"NaN or an infinity in the gradient of '{name}' on rank 1: nothing was updated")
        assert untouched
        assert unmarked
        assert skipped == 0


@pytest.mark.parametrize("layout", ["fsdp", "replicated"])
@pytest.mark.parametrize("keywords", [{}, {"static_grads": True}, {"foreach": False}])
def test_a_skipped_step_leaves_no_trace_and_is_counted(two, layout, keywords):
    found = two.run(stained_run, layout, [0], ["second.weight"], float("nan"), {"on_nonfinite": "skip", **keywords})
    assert found == [("", True, True, 1)] * 2


def test_all_ranks_and_many_parameters_are_told_shortly(two):
    names = ["embed.weight", "first.weight", "second.weight", "norm.weight"]
    found = two.run(stained_run, "fsdp", [0, 1], names, float("nan"), {"on_nonfinite": "raise"})
    assert found[0][0] == found[1][0]
    assert "and 1 more on rank 0; " in found[0][0]
    assert "and 1 more on rank 1: " in found[0][0]


def test_static_grads_still_ask_of_nonfinite(two):
    keywords = {"on_nonfinite": "raise", "static_grads": True}
    for told, untouched, unmarked, _ in two.run(stained_run, "fsdp", [1], ["first.weight"], float("nan"), keywords):
        assert "'first.weight' on rank 1" in told
        assert untouched
        assert unmarked


def own_parameter_beside_shared_ones():
    shared = fully_shard(nn.Linear(6, 6, bias=False))
    own = nn.Linear(6, 6, bias=False)
    named = [("shared", shared.weight), ("own", own.weight)]
    optimizer = distmuon.Muon(named, lr=0.02, adamw_lr=1e-3, on_nonfinite="raise")
    shared.weight.grad, own.weight.grad = torch.ones_like(shared.weight), torch.ones_like(own.weight)
    if dist.get_rank() == 1:
        own.weight.grad[0, 0] = float("nan")
    before = own.weight.detach().clone()
    try:
        optimizer.step()
    except FloatingPointError as error:
        return str(error), torch.equal(before, own.weight)
    return "", False


def test_a_parameter_of_one_rank_alone_stops_all(two):
    for told, untouched in two.run(own_parameter_beside_shared_ones):
        assert told.startswith("NaN or an infinity in the gradient of 'own' on rank 1")
        assert untouched


def with_the_ddp_hook(bad):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)]))
    optimizer = distmuon.Muon(model, on_nonfinite="raise", **SETTINGS)
    model.register_comm_hook(optimizer, distmuon.ddp_hook)
    for step in range(2):
        optimizer.zero_grad()
        inputs = torch.full((2, 8), float("nan") if bad and step and dist.get_rank() == 0 else 1.0)
        model(inputs).sum().backward()
        try:
            optimizer.step()
        except FloatingPointError as error:
            return str(error)
    return ""


def test_gradients_that_only_owners_have_are_looked_at_there(two):
    assert two.run(with_the_ddp_hook, False) == ["", ""]
    first, second = two.run(with_the_ddp_hook, True)
    assert first == second
    assert first.startswith("NaN or an infinity in the gradient of '")
    assert "on rank 0; " in first
    assert "on rank 1: " in first


def scaled_steps():
    """The scaler of mixed precision sees an infinity on rank 1 in the second of three steps."""
    model = model_in("fsdp")
    optimizer = optimizer_in("fsdp", model, on_nonfinite="raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    kept = []
    for step in range(3):
        set_gradients(model, step)
        for param in model.parameters():
            param.grad *= scaler.get_scale()
        if step == 1 and rank() == 1:
            stain(model.first.weight, float("inf"))
        scaler.scale(torch.zeros(()))  # a scaler makes its scale when it is first asked to
        scaler.step(optimizer)
        scaler.update()
        kept.append(all_of(model, optimizer))
    return same(kept[0], kept[1]), same(kept[1], kept[2]), scaler.get_scale(), optimizer.skipped_steps


def test_a_scaler_skips_by_itself(two):
    assert two.run(scaled_steps) == [(True, False, 2.0, 0)] * 2


def counted_of_very_many():
    with mock.patch("torch.distributed.all_reduce", lambda tensor, group: tensor.mul_(1_000_000)):
        return agree(
            dist.group.WORLD,
            torch.device("cpu"),
            replan=False,
            idle=False,
            nonfinite=False,
            gradients=[True, True, False],
            unreduced=[True, False, False],
            error=None,
            step=1,
        )


def test_a_million_ranks_can_be_counted(two):
    for agreement in two.run(counted_of_very_many):
        assert agreement.gradients == (1_000_000, 1_000_000, 0)
        assert agreement.unreduced == (1_000_000, 0, 0)


@pytest.mark.parametrize("choice", ["raise", "skip"])
def test_one_process(choice, caplog):
    caplog.set_level(logging.WARNING, logger="distmuon")
    told, untouched, unmarked, skipped = stained_run(
        "one", [0], ["first.weight"], float("nan"), {"on_nonfinite": choice}
    )
    assert untouched
    assert unmarked
    assert skipped == (choice == "skip")
    assert "'first.weight' on rank 0" in (caplog.text if choice == "skip" else told)
    assert "on_nonfinite='skip'" not in caplog.text, "advice that was taken already"


def test_without_it_nobody_looks():
    model = model_in("one")
    optimizer = optimizer_in("one", model)
    set_gradients(model, 0)
    stain(model.first.weight, float("nan"))
    optimizer.step()
    assert not model.first.weight.isfinite().all()


def test_the_error_of_another_process_can_be_sent_home():
    error = NonfiniteError("'a' on rank 1")
    copied = pickle.loads(pickle.dumps(error))
    assert str(copied) == str(error)
    assert copied.found == "'a' on rank 1"


def test_a_wrong_choice_is_an_error():
    with pytest.raises(ValueError, match="on_nonfinite='ignore': it is 'raise', 'skip' or None"):
        optimizer_in("one", model_in("one"), on_nonfinite="ignore")


def test_copies_count_for_themselves():
    model = model_in("one")
    optimizer = optimizer_in("one", model, on_nonfinite="skip")
    set_gradients(model, 0)
    stain(model.first.weight, float("nan"))
    optimizer.step()
    assert copy.deepcopy(optimizer).skipped_steps == 0
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_which_tensors_are_not_finite(dtype):
    largest = torch.finfo(dtype).max
    tensors = [torch.zeros(0, dtype=dtype), torch.tensor([largest, -largest], dtype=dtype)]
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in range(5):
            tensors.append(torch.arange(10, dtype=dtype)[::2].clone())
            tensors[-1][place] = value
        tensors.append(torch.ones(3, 4, dtype=dtype)[:, 1::2])
    assert nonfinite(tensors) == [False, False, *[True] * 5, False, *[True] * 5, False, *[True] * 5, False]
    assert nonfinite([]) == []
