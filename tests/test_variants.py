"""NorMuon and AdaMuon in one process: state, switching, refusals. Their formulas are in tests/test_family.py."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import distmuon
from distmuon.checkpoint.converting import convert
from distmuon.moments import STATE_KEY
from distmuon.numerics.variants import divide_by_moments_
from distmuon.values import FAMILY_KEYS

VARIANTS = ("normuon", "adamuon")


def make(variant, seed=0, dtype=torch.float32, **keywords):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 3)).to(dtype)
    return model, distmuon.Muon(model, lr=0.02, adamw_lr=1e-3, variant=variant, **keywords)


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        dtype = model[0].weight.dtype
        loss = model(torch.randn(7, 4, generator=generator).to(dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def moments(optimizer):
    return {
        name: optimizer.state[param].get(STATE_KEY)
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
        if group["use_muon"]
    }


def test_state_keys_and_shapes():
    for variant, shape in (("normuon", (6, 1)), ("adamuon", (6, 4))):
        model, optimizer = make(variant, dtype=torch.bfloat16)
        train(model, optimizer, 1)
        state = optimizer.state[model[0].weight]
        assert set(state) == {"momentum_buffer", STATE_KEY}
        assert state[STATE_KEY].shape == shape
        assert state[STATE_KEY].dtype == torch.float32
        assert (state[STATE_KEY] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_exact(variant, dtype):
    """In float32 also beside parameters of 16 bits, to whose dtype torch casts what it loads."""
    model, optimizer = make(variant, dtype=dtype)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    for way in ("file", "dcp"):
        other, restored = make(variant, seed=5, dtype=dtype)
        other.load_state_dict(model.state_dict())
        if way == "file":
            file.seek(0)
            restored.load_state_dict(torch.load(file, weights_only=True))
        else:
            saved = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(other, restored, saved)
        train(other, restored, 2, seed=2)
        before = {name: param.clone() for name, param in model.named_parameters()}
        kept = {name: value.clone() for name, value in moments(optimizer).items()}
        twin, undisturbed = make(variant, dtype=dtype)
        train(twin, undisturbed, 3)
        train(twin, undisturbed, 2, seed=2)
        for name, param in twin.named_parameters():
            assert torch.equal(param, other.get_parameter(name)), (way, name)
        for name, value in moments(undisturbed).items():
            assert torch.equal(value, moments(restored)[name])
            assert value.dtype == torch.float32 and not torch.equal(value, kept[name])
        assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize(("before", "after"), [("muon", "normuon"), ("normuon", "adamuon"), ("adamuon", "muon")])
def test_another_variant_goes_on_with_the_momentum_and_is_told(before, after):
    model, optimizer = make(before)
    train(model, optimizer, 2)
    other, restored = make(after, seed=5, muon_beta2=0.9)
    with pytest.warns(
        UserWarning, match=f"group 0 was saved with variant='{before}' and keeps its own variant='{after}'"
    ):
        restored.load_state_dict(optimizer.state_dict())
    assert restored.param_groups[0]["variant"] == after
    assert restored.param_groups[0]["muon_beta2"] == 0.9
    for (name, value), param in zip(moments(restored).items(), restored.param_groups[0]["params"], strict=True):
        assert value is None, name
        momentum = optimizer.state[dict(model.named_parameters())[name]]["momentum_buffer"]
        assert torch.equal(restored.state[param]["momentum_buffer"], momentum)
    train(other, restored, 1)
    assert all((value is None) == (after == "muon") for value in moments(restored).values())
    # and its own state is whole again
    third, again = make(after, seed=6)
    again.load_state_dict(restored.state_dict())
    train(third, again, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_and_single_rows(variant):
    """A zero gradient moves nothing; a matrix of one row has the size of one singular value."""
    param = nn.Parameter(torch.ones(3, 5))
    row = nn.Parameter(torch.ones(1, 5))
    optimizer = distmuon.Muon(
        [{"params": [("w", param), ("row", row)], "use_muon": True}], lr=0.1, weight_decay=0.0, variant=variant
    )
    param.grad, row.grad = torch.zeros(3, 5), torch.arange(5.0)[None]
    optimizer.step()
    assert torch.equal(param, torch.ones(3, 5))
    assert torch.isclose((row - 1).norm(), torch.tensor(0.1), rtol=1e-2)


def test_results_do_not_depend_on_neighbours():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(5, 8, 12, generator=generator).bfloat16()
    kept = torch.rand(5, 8, 1, generator=generator)
    together, moments_ = directions.clone(), kept.clone()
    divide_by_moments_(together, moments_, beta2=0.9)
    for number in range(5):
        alone, own = directions[number : number + 1].clone(), kept[number : number + 1].clone()
        divide_by_moments_(alone, own, beta2=0.9)
        assert torch.equal(alone[0], together[number])
        assert torch.equal(own[0], moments_[number])


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_to_keeps_the_dtype_of_moments(variant):
    model, optimizer = make(variant)
    train(model, optimizer, 1)
    before = {name: value.clone() for name, value in moments(optimizer).items()}
    model.bfloat16()
    train(model, optimizer, 0)
    optimizer.zero_grad()
    model(torch.zeros(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    for name, value in moments(optimizer).items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name])


def test_report_says_what_updates_a_group():
    _, optimizer = make("normuon", muon_beta2=0.9)
    said = "group 0 is updated by normuon, with a second moment of each row (muon_beta2=0.9)."
    assert said in optimizer.report().notes
    _, optimizer = make("muon", cautious_wd=True)
    assert "of group 0, 1 only weights that a step makes smaller decay (cautious_wd)." in optimizer.report().notes
    _, optimizer = make("muon")
    assert "second moment" not in str(optimizer.report())


@pytest.mark.parametrize("target", ["torch", "kellerjordan", "dion", "moonlight", "muon_fsdp2"])
def test_other_projects_have_no_variant(target):
    param = nn.Parameter(torch.ones(3, 5))
    optimizer = distmuon.Muon([{"params": [("w", param)], "use_muon": True}], variant="normuon")
    param.grad = torch.randn(3, 5)
    optimizer.step()
    with pytest.raises(ValueError, match=r"'w' has variant='normuon', which .* does not know"):
        convert(optimizer.state_dict(), target=target, names=["w"])
    same = convert(optimizer.state_dict(), target="distmuon", names=["w"])
    assert torch.equal(same["state"][0][STATE_KEY], optimizer.state[param][STATE_KEY])
    assert same["param_groups"][0]["variant"] == "normuon"


def test_unknown_names_and_values():
    for wrong in ({"variant": "norm"}, {"muon_beta2": 1.0}, {"cautious_wd": 1}, {"block_period": 0}, {"blocks": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make(**{"variant": "muon", **wrong})
    with pytest.raises(ValueError, match=r"'muonbp' is unknown.*MuonBP is block_period and blocks"):
        make("muonbp")
    with pytest.raises(ValueError, match="block_period=3 and does not say into how many blocks"):
        make("muon", block_period=3)


GROUPS = [
    {"variant": "muon"},
    {"variant": "normuon"},
    {"variant": "normuon", "muon_beta2": 0.5},
    {"variant": "normuon", "transposed": True},
    {"variant": "adamuon"},
    {"variant": "adamuon", "muon_beta2": 0.5, "transposed": True},
]


def test_groups_of_one_shape_keep_their_own_rules():
    """Their matrices are orthogonalized alike, and must not be divided alike."""

    def groups(numbers):
        torch.manual_seed(3)
        params = [nn.Parameter(torch.randn(5, 5)) for _ in GROUPS]
        return params, [
            {"params": [(f"w{n}", params[n])], "use_muon": True, "adjust_lr_fn": "none", **GROUPS[n]} for n in numbers
        ]

    together, everything = groups(range(len(GROUPS)))
    optimizers = [distmuon.Muon(everything, lr=0.1)]
    apart = []
    for number in range(len(GROUPS)):
        params, alone = groups([number])
        apart.append(params[number])
        optimizers.append(distmuon.Muon(alone, lr=0.1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for mine, other in zip(together, apart, strict=True):
            mine.grad = torch.randn(5, 5, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for number, (mine, other) in enumerate(zip(together, apart, strict=True)):
        assert torch.equal(mine, other), GROUPS[number]


def test_a_variant_set_by_hand_acts_from_the_next_step():
    param = nn.Parameter(torch.randn(4, 6))
    optimizer = distmuon.Muon([{"params": [("w", param)], "use_muon": True}], lr=0.1)
    for variant, shape in (("muon", None), ("normuon", (4, 1)), ("adamuon", (4, 6)), ("normuon", (4, 1))):
        optimizer.param_groups[0]["variant"] = variant
        param.grad = torch.randn(4, 6)
        optimizer.step()
        kept = optimizer.state[param].get(STATE_KEY)
        assert (None if kept is None else tuple(kept.shape)) == shape


def test_an_optimizer_that_was_pickled_before_there_were_these_keys():
    model, optimizer = make("muon")
    train(model, optimizer, 2)
    copied, undisturbed = copy.deepcopy((model, optimizer))
    for settings in (optimizer.defaults, *optimizer.param_groups):
        for key in (*FAMILY_KEYS, "block_step", "lmo"):
            del settings[key]
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, 2)
    train(copied, undisturbed, 2)
    assert all(map(torch.equal, model.parameters(), copied.parameters()))
    assert optimizer.param_groups[0]["variant"] == "muon"
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(3, 3)))], "use_muon": True})


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"variant": "norm"}, r"group 0 \(muon\): variant='norm' is unknown"),
        ({"variant": "normuon", "muon_beta2": 1.0}, r"group 0 \(muon\) has muon_beta2=1.0"),
        ({"block_period": 2}, "block_period=2 and does not say into how many blocks"),
        ({"block_period": 1.5, "blocks": 2}, "block_period=1.5: it is a whole number"),
    ],
)
def test_what_is_written_into_a_group_by_hand_is_checked(edits, message):
    model, optimizer = make("muon")
    train(model, optimizer, 1)
    kept = [param.clone() for param in model.parameters()]
    before = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(edits)
    with pytest.raises(ValueError, match=message):
        train(model, optimizer, 1)
    assert all(map(torch.equal, kept, model.parameters()))
    optimizer.param_groups[0].update(before)
    train(model, optimizer, 1)
