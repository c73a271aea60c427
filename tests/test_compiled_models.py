"""Models inside torch.compile, activation checkpointing and other wrappers: as without, in names, routes and bits."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import distmuon
from distmuon.numerics.orthogonalize import iterate
from distmuon.numerics.rationals import RATIONALS
from distmuon.numerics.recipe import Request, choose
from tests.distributed.harness import run_ranks

STEPS = 3


class Block(nn.Module):
    def __init__(self, recompute):
        super().__init__()
        self.up, self.down, self.recompute = nn.Linear(8, 12), nn.Linear(12, 8), recompute

    def forward(self, x):
        if self.recompute:
            return x + checkpoint(lambda y: self.down(torch.tanh(self.up(y))), x, use_reentrant=False)
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, recompute=False):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block(recompute) for _ in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def compiled(module):
    # the same operations, as nothing is generated: so bits can be compared
    return torch.compile(module, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def each_block(wrap):
    def wrapped(model):
        for number, block in enumerate(model.blocks):
            model.blocks[number] = wrap(block)
        return model

    return wrapped


class FSDP1Like(nn.Module):
    """Names parameters as FSDP1 with use_orig_params=True does."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args):
        return self._fsdp_wrapped_module(*args)


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "compiled blocks": each_block(compiled),
    "checkpointed blocks": each_block(checkpoint_wrapper),
    "compiled, of checkpointed blocks": lambda model: compiled(each_block(checkpoint_wrapper)(model)),
    "checkpointed, of compiled blocks": lambda model: each_block(lambda block: checkpoint_wrapper(compiled(block)))(
        model
    ),
    "checkpointed": checkpoint_wrapper,
}
SHARDED = {
    "sharded": sharded,
    "compiled, then sharded": lambda model: fully_shard(compiled(each_block(fully_shard)(model))),
    "sharded, then compiled": lambda model: compiled(sharded(model)),
    "compiled blocks, then sharded": lambda model: sharded(each_block(compiled)(model)),
    "checkpointed blocks, then sharded": lambda model: sharded(each_block(checkpoint_wrapper)(model)),
}
REPLICATED = {
    "replicated": DistributedDataParallel,
    "compiled, then replicated": lambda model: DistributedDataParallel(compiled(model)),
    "replicated, then compiled": lambda model: compiled(DistributedDataParallel(model)),
}


# torch 2.13 keeps "_orig_mod" in names inside checkpoint_wrapper, and finds no names in a compiled DDP model
NAMED_OTHERWISE_BY_TORCH = ("checkpointed, of compiled blocks", "replicated, then compiled")


def build(wrap=lambda model: model, recompute=False, **options):
    torch.manual_seed(0)
    model = wrap(Net(recompute))
    return model, distmuon.Muon(model, lr=0.05, adamw_lr=0.01, **options)


def train(model, optimizer, steps=range(STEPS)):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        model(torch.randint(0, 16, (4, 5), generator=generator)).square().sum().backward()
        distmuon.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def named(optimizer):
    return [(group["name"], group["param_names"]) for group in optimizer.param_groups]


def state_of(optimizer):
    """Parameters and state on this rank by name, plain."""
    found = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            for key, value in {"param": param, **optimizer.state[param]}.items():
                local = value.to_local() if hasattr(value, "to_local") else value
                found[f"{name} {key}"] = local.detach().clone()
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def assert_as_without(wrap, wanted_names, wanted, named_by_torch=True):
    """Names and bits are those of the model without the wrapper, and names those of torch's checkpoints."""
    model, optimizer = build(wrap)
    assert named(optimizer) == wanted_names
    if named_by_torch:
        assert {name for _, names in named(optimizer) for name in names} == set(get_model_state_dict(model))
    train(model, optimizer)
    assert_same(state_of(optimizer), wanted)
    return model, optimizer


def hand_over(source, target):
    """By the functions of torch.distributed.checkpoint, which know parameters by their names without prefixes."""
    parameters, states = copy.deepcopy(get_state_dict(*source))
    set_state_dict(*target, model_state_dict=parameters, optim_state_dict=states)


@pytest.fixture(scope="module")
def plain():
    model, optimizer = build()
    train(model, optimizer)
    return model, optimizer, named(optimizer), state_of(optimizer)


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_wrapped_model_trains_as_without(plain, how):
    *trained, names, wanted = plain
    by_torch = how not in NAMED_OTHERWISE_BY_TORCH
    wrapped = assert_as_without(WRAPPERS[how], names, wanted, by_torch)
    moments = {name: value for name, value in wanted.items() if not name.endswith("param")}
    for source, wrap in ((wrapped, lambda model: model), (trained, WRAPPERS[how])):
        _, optimizer = build(wrap)
        optimizer.load_state_dict(copy.deepcopy(source[1].state_dict()))
        found = state_of(optimizer)
        assert_same({name: found[name] for name in moments}, moments)
        if by_torch:
            target = build(wrap)
            hand_over(source, target)
            assert_same(state_of(target[1]), wanted)


def test_recomputed_activations_change_no_bit(plain):
    *_, names, wanted = plain
    model, optimizer = build(recompute=True)
    train(model, optimizer)
    assert named(optimizer) == names
    assert_same(state_of(optimizer), wanted)


def test_globs_match_names_without_prefixes():
    for wrap in (*WRAPPERS.values(), FSDP1Like, lambda model: FSDP1Like(compiled(model))):
        _, optimizer = build(wrap, adamw_names=["blocks.0.up.*"])
        muon = {name for label, names in named(optimizer) if label == "muon" for name in names}
        assert muon == {"blocks.0.down.weight", "blocks.1.up.weight", "blocks.1.down.weight"}


@pytest.mark.parametrize(
    "wrap", [compiled, checkpoint_wrapper, FSDP1Like, lambda model: checkpoint_wrapper(compiled(model))]
)
def test_the_last_layer_of_a_wrapped_sequential_is_its_head(wrap):
    layers = wrap(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)))
    routes = distmuon.Muon(layers, lr=0.1, adamw_lr=0.1).report()
    assert "output head" in next(line for line in str(routes).splitlines() if "2.weight" in line)


def test_a_module_of_the_users_may_be_called_module():
    model = nn.Module()
    model.module, model.weight = Net(), nn.Parameter(torch.zeros(4, 4))
    names = [name for _, members in named(distmuon.Muon(model, lr=0.1, adamw_lr=0.1)) for name in members]
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    model.module = nn.Linear(4, 4)
    for params in (model, list(model.named_parameters())):
        with pytest.raises(ValueError, match=r"'weight' and 'module.weight' are both 'weight'"):
            distmuon.Muon(params, lr=0.1, adamw_lr=0.1)


def distributed_models():
    for ways in (SHARDED, REPLICATED):
        first, *others = ways
        reference = build(ways[first])
        train(*reference)
        names, wanted = named(reference[1]), state_of(reference[1])
        for how in others:
            by_torch = how not in NAMED_OTHERWISE_BY_TORCH
            model = assert_as_without(ways[how], names, wanted, by_torch)
            assert len(model[1]._binding.parts) == 1 and model[1]._binding.parts[0].group is not None
            if by_torch:
                for source, wrap in ((model, ways[first]), (reference, ways[how])):
                    target = build(wrap)
                    hand_over(source, target)
                    assert_same(state_of(target[1]), wanted)
            torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_models_are_sharded_and_replicated():
    run_ranks(distributed_models, 2, timeout=120.0)


COEFFICIENTS = ("auto", "quintic", (2.0, -1.5, 0.5), ((2.0, -1.5, 0.5), (1.5, -0.5)))


@pytest.mark.parametrize("engine", ["auto", "standard", "composed", "gram", "rational"])
def test_orthogonalize_is_one_operator_of_a_whole_graph(engine):
    def double(x, **options):
        return 2 * distmuon.orthogonalize(x + 1, **options)

    for coefficients in COEFFICIENTS if engine != "rational" else ("auto",):
        torch._dynamo.reset()
        graph = torch.compile(double, backend="aot_eager", fullgraph=True)
        for dtype, shape in ((None, (5, 9)), (torch.bfloat16, (2, 6, 4))):
            x = torch.randn(shape, requires_grad=True)
            options = {"engine": engine, "coefficients": coefficients, "dtype": dtype, "eps": 1e-7}
            found, wanted = graph(x, **options), double(x, **options)
            assert torch.equal(found, wanted) and found.dtype == wanted.dtype
    with pytest.raises(ValueError, match="unknown"):
        graph(x, engine="nope")


@pytest.mark.parametrize("engine", ["composed", "gram"])
def test_batches_of_the_compiled_step_are_one_graph(engine):
    torch._dynamo.reset()
    graph = torch.compile(iterate, dynamic=True, fullgraph=True, backend="eager")
    for count, rows, cols in ((3, 6, 10), (2, 12, 5)):
        x = torch.randn(count, rows, cols) / (rows * cols) ** 0.5 / 2
        request = Request(torch.float32, engine, "quintic", 2, compile=True)
        recipe = choose(rows, cols, x.device, request, None)
        assert recipe.batched and recipe.engine == engine
        assert torch.equal(graph(x, recipe), iterate(x, recipe))


def test_the_operator_says_what_it_returns():
    x = torch.randn(3, 6, 4)
    arguments = (x, "composed", None, [2.0, -1.5, 0.5, 1.5, -0.5], [3, 2], None, 0.0, torch.bfloat16, 1.01, None)
    torch.library.opcheck(torch.ops.distmuon.orthogonalize.default, arguments)


def test_orthogonalize_breaks_a_graph_once_for_what_no_graph_holds():
    torch._dynamo.reset()
    counter = CompileCounter()
    options = {"coefficients": RATIONALS["rational2"]}
    x = torch.randn(4, 6)
    found = torch.compile(lambda x: distmuon.orthogonalize(x + 1, **options) * 2, backend=counter)(x)
    assert torch.equal(found, distmuon.orthogonalize(x + 1, **options) * 2)
    assert counter.frame_count == 2
