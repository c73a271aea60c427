"""distmuon.wrap over sharded and replicated models: both parts to the bit, and state through torch's checkpoints."""

import copy
import logging
import pickle

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distmuon

MATRICES = ("up.weight", "down.weight")


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as pool:
        yield pool


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 25)  # rows that two ranks do not share evenly
        self.down = nn.Linear(25, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 20)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.down(self.up(x).relu()))).logsumexp(-1).mean()


def sharded():
    model = Net()
    return fully_shard(model)


def replicated():
    return DistributedDataParallel(Net())


LAYOUTS = {"fsdp": sharded, "ddp": replicated}


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def wrapped(model, **options):
    return distmuon.wrap(model, adamw(model.parameters()), **options)


def by_hand(model):
    """distmuon.Muon of the matrices alone, and AdamW of the others alone."""
    named = {name.removeprefix("module."): param for name, param in model.named_parameters()}
    group = {"params": [(name, named[name]) for name in MATRICES], "use_muon": True}
    mesh = model.process_group if isinstance(model, DistributedDataParallel) else None
    muon = distmuon.Muon([group], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", mesh=mesh)
    return [muon, adamw([param for name, param in named.items() if name not in MATRICES])]


def backward(model, step):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    model(torch.randint(20, (8,), generator=generator)).backward()


def train(model, optimizers, steps, max_norm=None, owners=None):
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, step)
        if max_norm is not None:
            distmuon.clip_grad_norm_(model, max_norm, owners=owners)
        for optimizer in optimizers:
            optimizer.step()


def local(tensor):
    return tensor.detach() if not hasattr(tensor, "to_local") else tensor.to_local().detach()


def differing(a, b):
    return [
        name
        for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True)
        if not torch.equal(local(x), local(y))
    ]


def parts(layout):
    model, twin, start = LAYOUTS[layout](), LAYOUTS[layout](), LAYOUTS[layout]()
    optimizer, hand = wrapped(model), by_hand(twin)
    train(model, [optimizer], range(3), max_norm=0.1)
    train(twin, hand, range(3), max_norm=0.1)
    return differing(model, twin), len(differing(model, start)), sorted(set(optimizer.owners().values()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_parts_are_those_of_two_optimizers(pool, layout):
    results = pool.run(parts, layout)
    assert [(found, moved) for found, moved, _ in results] == [([], 9)] * 2
    # a matrix of a DDP model is orthogonalized once, by one of the ranks
    assert all(owners == ([0, 1] if layout == "ddp" else []) for *_, owners in results)


def resume(layout, begun):
    model = LAYOUTS[layout]()
    optimizer = wrapped(model)
    train(model, [optimizer], range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = LAYOUTS[layout]()
    if begun:  # by the user's optimizer alone, so that there is state of the rest and none of matrices
        inner = adamw(twin.parameters())
        train(twin, [inner], range(1))
        inner.zero_grad()
        other = distmuon.wrap(twin, inner)
        get_optimizer_state_dict(twin, other)
    else:
        other = wrapped(twin)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, saved)
    untouched = differing(model, twin)
    train(model, [optimizer], range(2, 4))
    train(twin, [other], range(2, 4))
    return sorted(saved["state"]), untouched, differing(model, twin)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_goes_through_torch_checkpoints(pool, layout, begun):
    names = sorted(name for name, _ in Net().named_parameters())
    assert pool.run(resume, layout, begun) == [(names, [], [])] * 2


def skip(layout):
    model = LAYOUTS[layout]()
    optimizer = wrapped(model, on_nonfinite="skip")
    train(model, [optimizer], range(1))
    before = copy.deepcopy([local(param).clone() for param in model.parameters()])
    backward(model, 1)
    if dist.get_rank() == 1:  # in what only this rank's AdamW would see
        named = {name.removeprefix("module."): param for name, param in model.named_parameters()}
        local(named["embedding.weight"].grad)[0, 0] = float("inf")
    optimizer.step()
    same = all(torch.equal(a, local(b)) for a, b in zip(before, model.parameters(), strict=True))
    return optimizer.skipped_steps, same


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_left_out_by_both_parts_on_all_ranks(pool, layout):
    assert pool.run(skip, layout) == [(1, True)] * 2


def hooked():
    plain, model = replicated(), replicated()
    optimizer = wrapped(model, teams=False)
    model.register_comm_hook(optimizer, distmuon.ddp_hook)
    reference = wrapped(plain, teams=False)
    train(plain, [reference], range(3))
    train(model, [optimizer], range(3))
    optimizer.consolidate_state_dict()
    expected, found = reference.state_dict()["state"], optimizer.state_dict()["state"]
    state = [
        key for number in expected for key in expected[number] if not torch.equal(*_pair(expected, found, number, key))
    ]
    return differing(model, plain), state


def _pair(a, b, number, key):
    return a[number][key], b[number][key]


def test_gradients_of_owners_alone(pool):
    assert pool.run(hooked) == [([], [])] * 2


def in_backward():
    """One optimizer a parameter, stepped as soon as its gradient is there."""
    model, twin = sharded(), sharded()
    optimizers = {}
    for name, param in model.named_parameters():
        if name in MATRICES:
            group = {"params": [(name, param)], "use_muon": True}
            optimizers[param] = distmuon.Muon([group], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        else:
            optimizers[param] = adamw([param])
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda param: (optimizers[param].step(), optimizers[param].zero_grad())
        )
    for step in range(3):
        backward(model, step)
    train(twin, by_hand(twin), range(3))
    return differing(model, twin)


def test_optimizers_in_backward_of_fsdp(pool):
    assert pool.run(in_backward) == [[]] * 2


def pickled():
    """A pickled optimizer has no mesh: the same updates, each rank for itself, and a message that says so."""
    model, twin = replicated(), replicated()
    optimizer = distmuon.Muon(model, lr=1e-2, adamw_lr=1e-2, teams=False)
    train(model, [optimizer], range(2))
    twin.load_state_dict(model.state_dict())
    inside = copy.deepcopy(optimizer)
    shared = copy.deepcopy(optimizer)._mesh is optimizer._mesh
    module, loose = pickle.loads(pickle.dumps((model.module, optimizer)))
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("distmuon").addHandler(handler)
    for step in range(2, 4):
        optimizer.zero_grad()
        backward(model, step)
        for param, other in zip(model.parameters(), module.parameters(), strict=True):
            other.grad = param.grad.clone()
        optimizer.step()
        loose.step()
    return shared, differing(model.module, module), [text.split(",")[0] for text in told], len(inside.state)


def test_a_pickled_optimizer_says_that_it_has_no_mesh(pool):
    assert pool.run(pickled) == [(True, [], ["this optimizer was pickled"], 9)] * 2


def pickled_with_hook():
    model = replicated()
    optimizer = distmuon.Muon(model, lr=1e-2, adamw_lr=1e-2, teams=False)
    model.register_comm_hook(optimizer, distmuon.ddp_hook)
    train(model, [optimizer], range(2))
    errors = []
    for attempt in (lambda: pickle.dumps(optimizer), copy.deepcopy(optimizer).state_dict):
        try:
            attempt()
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def test_momentum_of_owners_alone_is_not_pickled(pool):
    for errors in pool.run(pickled_with_hook):
        assert len(errors) == 2 and all("consolidate_state_dict() on all ranks" in text for text in errors)
