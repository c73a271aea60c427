"""CPU offload: momentum is blended on the host and matrices are multiplied elsewhere, whatever the copies take."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distmuon
from distmuon.binding import _offloaded
from distmuon.comm.buffers import BufferPool
from distmuon.comm.group import compute_device
from distmuon.staging import Staging, StreamLane
from tests.distributed.harness import Pool

STEPS = 3
# Ways to keep the same model on two ranks
LAYOUTS = ("fsdp", "rows7", "replicated", "alone")


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as pool:
        yield pool


class LateLane:
    """Copies as late as an accelerator may: at the moment when somebody waits for them, and nobody knows before."""

    def __init__(self):
        self.begun, self.pending = 0, []

    def copy(self, pairs):
        self.begun += 1
        for source, target in pairs:
            assert source.shape == target.shape and source.is_contiguous() and target.is_contiguous()
            target.fill_(torch.nan)
        mark = LateMark(self, list(pairs))
        self.pending.append(mark)
        return mark

    @contextlib.contextmanager
    def inside(self):
        self.run_until(None)
        yield

    def run_until(self, mark):
        while self.pending and not (mark is not None and mark.passed):
            earliest = self.pending.pop(0)
            for source, target in earliest.pairs:
                target.copy_(source)
            earliest.passed = True


class LateMark:
    def __init__(self, lane, pairs):
        self.lane, self.pairs, self.passed = lane, pairs, False

    def join(self):
        self.lane.run_until(self)

    wait = join


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=number == 0) for number in range(3))
        self.wide = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.norm(self.wide(x))


def build(layout, mesh, **policy):
    torch.manual_seed(0)
    model = Net(7 if layout == "rows7" else 12)
    if layout in ("fsdp", "rows7"):
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **policy)
        fully_shard(model, mesh=mesh, **policy)
    options = {"mesh": mesh} if layout == "replicated" else {}
    optimizer = distmuon.Muon(model, lr=0.05, adamw_lr=0.01, bucket_bytes=200, on_nonfinite="skip", **options)
    return model, optimizer


def train(model, optimizer, steps=range(STEPS), stain=None):
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        model(torch.randint(0, 16, (4, 5), generator=generator)).square().sum().backward()
        if step == stain and torch.distributed.get_rank() == 1:
            param = model.blocks[1].weight
            (param.grad.to_local() if hasattr(param.grad, "to_local") else param.grad).fill_(torch.inf)
        norms.append(distmuon.clip_grad_norm_(model.parameters(), 0.5, keep_nonfinite=True))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def state_of(model, optimizer):
    """Parameters and optimizer state on this rank, plain."""
    found = {}
    for name, param in model.named_parameters():
        for key, value in {"param": param, **optimizer.state[param]}.items():
            found[f"{name} {key}"] = value.detach().to_local().clone() if hasattr(value, "to_local") else value.clone()
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def staged():
    """Staging as for an accelerator, in lanes that are as late as can be."""
    lanes = []

    def late(device):
        lanes.extend((LateLane(), LateLane()))
        return Staging(*lanes[-2:], BufferPool())

    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch("distmuon.binding._offloaded", return_value=True))
    patches.enter_context(mock.patch.object(Staging, "of", late))
    return patches, lanes


def offloaded_on_the_host():
    mesh = init_device_mesh("cpu", (2,))
    model, optimizer = build("fsdp", mesh)
    wanted_norms = train(model, optimizer, stain=1)
    wanted = state_of(model, optimizer)
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    offloaded, theirs = build("fsdp", mesh, **policy)
    norms = train(offloaded, theirs, stain=1)
    assert_same(state_of(offloaded, theirs), wanted)
    assert torch.equal(torch.stack(norms), torch.stack(wanted_norms)) and not norms[1].isfinite()
    assert optimizer.skipped_steps == theirs.skipped_steps == 1
    # from offloaded to not, and back, by torch's state dicts
    continued = []
    for (source, its), onto in (((offloaded, theirs), {}), ((model, optimizer), policy)):
        parameters, states = copy.deepcopy(get_state_dict(source, its))
        target, fresh = build("fsdp", mesh, **onto)
        set_state_dict(target, fresh, model_state_dict=parameters, optim_state_dict=states)
        assert_same(state_of(target, fresh), wanted)
        train(target, fresh, range(STEPS, STEPS + 1))
        continued.append(state_of(target, fresh))
    assert_same(*continued)


def test_offload_on_a_mesh_of_cpus_changes_no_bit(pool):
    pool.run(offloaded_on_the_host)


def staged_is_the_same(layout):
    mesh = init_device_mesh("cpu", (2,))
    model, optimizer = build(layout, mesh)
    train(model, optimizer, stain=1)
    wanted = state_of(model, optimizer)
    patches, lanes = staged()
    with patches:
        model, optimizer = build(layout, mesh)
        train(model, optimizer, stain=1)
    assert_same(state_of(model, optimizer), wanted)
    (part,) = optimizer._binding.parts
    waves = part.pipeline.plan.waves
    up, down = lanes
    stepped = STEPS - optimizer.skipped_steps
    assert len(waves) > 1 and up.begun == stepped * len(waves)
    legs = sum(wave.legs for wave in waves if wave.scatters)
    assert down.begun == stepped * (len(waves) + legs)
    pipeline = part.pipeline
    assert pipeline.pool.lent == 0
    assert pipeline.pool.peak <= pipeline.buffer_bytes() and pipeline.staging.pool.peak <= pipeline.buffer_bytes()


class Recorder:
    """Stands for the module of an accelerator, and notes what is asked of its streams in which order."""

    def __init__(self):
        self.log = []

    def Stream(self, device):  # noqa: N802
        return FakeStream(self.log, "side")

    def current_stream(self, device):
        return FakeStream(self.log, "main")

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append(f"enter {stream.name}")
        yield
        self.log.append(f"leave {stream.name}")


class FakeStream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for the {event}")

    def record_event(self):
        self.log.append(f"event in {self.name}")
        return "event"


def test_a_stream_copies_after_the_main_one_which_goes_on_after_the_copies():
    module, source, target = Recorder(), mock.Mock(), mock.Mock()
    target.copy_ = lambda *args, **kwargs: module.log.append(("copy", args[0] is source, kwargs))
    with mock.patch("torch.get_device_module", return_value=module):
        lane = StreamLane(torch.device("cuda"))
        lane.copy([(source, target)]).join()
    assert module.log == [
        "side waits for main",
        "enter side",
        ("copy", True, {"non_blocking": True}),
        "leave side",
        "event in side",
        "main waits for the event",
    ]


class Crossings(TorchDispatchMode):
    """Notes each operation that has tensors of the host and of the device, numbers aside."""

    def __init__(self):
        super().__init__()
        self.found, self.on_device = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        kinds = {tensor.device.type for tensor in tensors}
        if len(kinds) > 1:
            self.found.append(str(operation))
        if kinds == {"meta"}:
            self.on_device.append(str(operation))
        return result


class MetaLane:
    """Copies between the host and the meta device, which has no numbers: ones come home."""

    def __init__(self):
        self.bytes = []

    def copy(self, pairs):
        for source, target in pairs:
            assert {source.device.type, target.device.type} == {"cpu", "meta"} and source.shape == target.shape
            if target.device.type == "cpu":
                target.fill_(1.0)
        self.bytes.append(sum(source.nbytes for source, _ in pairs))
        return LateMark(LateLane(), [])

    inside = staticmethod(contextlib.nullcontext)


class MetaPool(BufferPool):
    """Knows buffers by themselves, as on the meta device none has an address."""

    def take(self, numel, dtype, device):
        return torch.empty(numel, dtype=dtype, device=device)

    def give(self, tensor):
        pass


def test_nothing_but_packed_buffers_crosses_between_host_and_device():
    up, down = MetaLane(), MetaLane()
    with (
        mock.patch("distmuon.binding.compute_device", return_value=torch.device("meta")),
        mock.patch.object(Staging, "of", lambda device: Staging(up, down, BufferPool())),
    ):
        torch.manual_seed(0)
        model = Net(12)
        optimizer = distmuon.Muon(model, lr=0.05, adamw_lr=0.01, ns_engine="composed", bucket_bytes=200)
        optimizer._rebind()
    (part,) = optimizer._binding.parts
    part.pipeline.pool = MetaPool()
    matrices = [param for group in optimizer.param_groups if group["use_muon"] for param in group["params"]]
    before = [param.detach().clone() for param in matrices]
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    # autocast knows no meta device
    with mock.patch("torch.autocast", lambda *args, **kwargs: contextlib.nullcontext()), Crossings() as crossings:
        optimizer.step()
    assert crossings.found == []
    assert any("addmm" in operation or "baddbmm" in operation for operation in crossings.on_device)
    total = sum(param.numel() for param in matrices) * torch.bfloat16.itemsize
    assert sum(up.bytes) == sum(down.bytes) == total
    assert len(up.bytes) == len(part.pipeline.plan.waves)
    for param, old in zip(matrices, before, strict=True):
        scale = max(1.0, param.size(0) / param.size(1)) ** 0.5
        torch.testing.assert_close(param, old * (1 - 0.05 * 0.1) - 0.05 * scale)
        assert optimizer.state[param]["momentum_buffer"].device.type == "cpu"


def test_the_mesh_decides_where_offloaded_matrices_are_multiplied():
    mesh, host = mock.Mock(spec=["device_type"], device_type="cuda"), torch.device("cpu")
    with mock.patch("torch.get_device_module") as module:
        module.return_value.current_device.return_value = 1
        assert compute_device([mesh], host) == torch.device("cuda", 1)
    assert compute_device([], host) == host
    param = nn.Parameter(torch.zeros(2, 2))
    for use_muon, device, wanted in ((True, "cuda", True), (False, "cuda", False), (True, "cpu", False)):
        entry = mock.Mock(param=param, fact=mock.Mock(use_muon=use_muon))
        assert _offloaded([entry], torch.device(device)) == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_staging_changes_no_bit_however_late_the_copies_are(pool, layout):
    pool.run(staged_is_the_same, layout)
