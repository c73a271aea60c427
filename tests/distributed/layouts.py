"""Models laid out over ranks, each beside its whole copy on one process, and steps of both from the same gradients.

Every rank builds the whole model from the same seed, keeps a copy, and shards the other. Gradients are drawn whole,
and a rank takes the elements that its layout gives it; where they lie is asked of ``__create_chunk_list__``. Results
are compared by ``full_tensor()``, which finds that out by other code.
"""

import copy
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import distmuon
from distmuon.plan.reading import Reading

SETTINGS = dict(lr=0.02, weight_decay=0.1, adamw_lr=0.01, adamw_weight_decay=0.2, foreach=False)
SIZES = {"even": (8, 16, 4), "uneven": (6, 7, 5), "few": (3, 2, 1)}
TP_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Model(nn.Module):
    """An embedding, two matrices, a stack of experts, a convolution, a norm and biases."""

    def __init__(self, dim, width, experts):
        super().__init__()
        self.embed = nn.Embedding(12, dim)
        self.up = nn.Linear(dim, width)
        self.down = nn.Linear(width, dim)
        self.experts = nn.Parameter(torch.randn(experts, dim, dim) / dim**0.5)
        self.conv = nn.Conv1d(dim, dim, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        x = x + torch.einsum("bti,eio->btoe", x, self.experts).tanh().sum(-1)
        x = self.norm(x + self.conv(x.mT).mT)
        return F.cross_entropy((x @ self.embed.weight.T).flatten(0, 1), tokens.roll(-1, 1).flatten())


@dataclass
class Twins:
    """Parameters over ranks, and the same parameters whole on this process.

    Attributes:
        ours: By name, what this rank stores.
        whole: By name, the whole copies.
        options: What the sharded optimizer needs to know.
        model: The model that holds ``ours``.
        whole_model: The model that holds ``whole``.
        data: Which of how many parts of a batch this rank reads.
        salt: Made part of the seed of gradients: what one rank's parameters and another's differ by.
        readings: By name, of parameters that are read otherwise than their names say.
    """

    ours: dict[str, torch.Tensor]
    whole: dict[str, nn.Parameter]
    options: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    whole_model: nn.Module | None = None
    data: tuple[int, int] = (0, 1)
    salt: dict[str, int] = field(default_factory=dict)
    readings: dict[str, Reading] = field(default_factory=dict)


@functools.cache
def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])


def whole_model(size, dtype=torch.float32):
    torch.manual_seed(1)
    return Model(*SIZES[size]).to(dtype)


def twins_of(model, whole, **more):
    return Twins(dict(model.named_parameters()), dict(whole.named_parameters()), model=model, whole_model=whole, **more)


def fsdp2(size, dtype, *, mesh=None, placement=None, policy=None):
    model = whole_model(size, dtype)
    whole = copy.deepcopy(model)
    settings = dict(mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    if placement is not None:
        settings["shard_placement_fn"] = lambda p: Shard(placement) if p.ndim > placement else None
    for module in (model.up, model.down, model):
        fully_shard(module, **settings)
    return twins_of(model, whole, data=(dist.get_rank(), dist.get_world_size()))


def fsdp2_mixed(dtype):
    return fsdp2("uneven", dtype, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def hsdp(size, replicas, dtype):
    twins = fsdp2(size, dtype, mesh=mesh_of(2, dist.get_world_size() // 2))
    twins.options["replicas"] = replicas
    return twins


def tp(dtype):
    model = whole_model("even", dtype)
    whole = copy.deepcopy(model)
    twins = twins_of(parallelize_module(model, mesh_of(dist.get_world_size()), TP_PLAN), whole)
    assert not isinstance(twins.ours["experts"], DTensor)
    return twins


def tp_fsdp2(dtype):
    model = whole_model("even", dtype)
    whole = copy.deepcopy(model)
    mesh = mesh_of(2, dist.get_world_size() // 2)
    parallelize_module(model, mesh["inner"], TP_PLAN)
    fully_shard(model, mesh=mesh["outer"])
    twins = twins_of(model, whole, data=(mesh.get_local_rank("outer"), 2))
    kinds = {type(placement).__name__ for placement in twins.ours["up.weight"].placements}
    assert kinds == {"_StridedShard", "Shard"}
    return twins


def ddp(dtype):
    model = whole_model("uneven", dtype)
    whole = copy.deepcopy(model)
    twins = twins_of(DistributedDataParallel(model), whole, data=(dist.get_rank(), dist.get_world_size()))
    twins.ours = {name.removeprefix("module."): param for name, param in twins.ours.items()}
    return twins


def replicated(kind, replicas, dtype):
    twins = twins_of(whole_model("uneven", dtype), whole_model("uneven", dtype))
    mesh = mesh_of(dist.get_world_size()) if kind == "mesh" else dist.group.WORLD
    twins.options.update(mesh=mesh, replicas=replicas)
    return twins


def distribute(twins, name, shape, mesh, placements, dtype, salt=0):
    """Adds a parameter; placements None: a plain one."""
    seed = zlib.crc32(repr((name, salt)).encode())
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    ours = whole.clone() if placements is None else distribute_tensor(whole, mesh, placements, src_data_rank=None)
    twins.ours[name], twins.whole[name], twins.salt[name] = nn.Parameter(ours), nn.Parameter(whole), salt


def experts(mesh_shape, placements, count, dtype):
    twins = Twins({}, {})
    for name, shape in {"wide": (count, 4, 6), "tall": (count, 6, 4)}.items():
        distribute(twins, name, shape, mesh_of(*mesh_shape), placements, dtype)
    return twins


def expert_meshes(dtype):
    """Dense parameters on all ranks; experts on pairs of ranks, under one name and of other numbers."""
    twins = fsdp2("uneven", dtype)
    pair = mesh_of(2, 2)["inner"]
    for name, shape in {"expert.up": (3, 5, 4), "expert.down": (2, 4, 5)}.items():
        distribute(twins, name, shape, pair, [Shard(0)], dtype, salt=dist.get_rank() // 2)
    distribute(twins, "expert.bias", (5,), pair, [Shard(0)], dtype, salt=dist.get_rank() // 2)
    return twins


def plain_beside(dtype):
    twins = fsdp2("uneven", dtype)
    distribute(twins, "own", (5, 9), None, None, dtype)
    distribute(twins, "own.bias", (5,), None, None, dtype)
    return twins


LAYOUTS: dict[str, Callable[[torch.dtype], Twins]] = {
    "fsdp2 even": functools.partial(fsdp2, "even"),
    "fsdp2 uneven": functools.partial(fsdp2, "uneven"),
    "fsdp2 few": functools.partial(fsdp2, "few"),
    "fsdp2 columns": functools.partial(fsdp2, "even", placement=1),
    "fsdp2 mixed": fsdp2_mixed,
    "hsdp even": functools.partial(hsdp, "even", "share"),
    "hsdp uneven": functools.partial(hsdp, "uneven", "share"),
    "hsdp repeat": functools.partial(hsdp, "uneven", "repeat"),
    "tp": tp,
    "tp x fsdp2": tp_fsdp2,
    "ddp": ddp,
    "plain, mesh": functools.partial(replicated, "mesh", "share"),
    "plain, group": functools.partial(replicated, "group", "share"),
    "plain, repeat": functools.partial(replicated, "mesh", "repeat"),
    "experts 5 on 2": functools.partial(experts, (2,), [Shard(0)], 5),
    "experts 1 on 2": functools.partial(experts, (2,), [Shard(0)], 1),
    "experts 4 on 4": functools.partial(experts, (4,), [Shard(0)], 4),
    "experts 5 on 4": functools.partial(experts, (4,), [Shard(0)], 5),
    "experts 3 on 4": functools.partial(experts, (4,), [Shard(0)], 3),
    "experts rows": functools.partial(experts, (4,), [Shard(1)], 3),
    "experts columns": functools.partial(experts, (4,), [Shard(2)], 3),
    "experts hsdp": functools.partial(experts, (2, 2), [Replicate(), Shard(0)], 5),
    "experts x rows": functools.partial(experts, (2, 2), [Shard(0), Shard(1)], 5),
    "expert meshes": expert_meshes,
    "plain beside": plain_beside,
}


# --- optimizers


def kind_of(name, param):
    """As what a parameter is optimized."""
    if param.ndim < 2 or "embed" in name:
        return "adamw"
    return "convolution" if param.ndim > 3 or "conv" in name else "matrix"


def groups_of(named, split=None, readings=None):
    """Parameter groups. ``split`` has group keys for every other matrix, which then is in a group of its own.

    So is every parameter of ``readings``.
    """
    read = readings or {}
    given = {name: param for name, param in named.items() if name in read}
    named = {name: param for name, param in named.items() if name not in read}
    groups = [{"params": [], "use_muon": kind != "adamw", "flatten": kind == "convolution"} for kind in KINDS]
    groups.append({"params": [], "use_muon": True, **(split or {})})
    for name, param in named.items():
        kind = KINDS.index(kind_of(name, param))
        if split is not None and kind == 0 and len(groups[0]["params"]) > len(groups[-1]["params"]):
            kind = -1
        groups[kind]["params"].append((name, param))
    groups += [{"params": [(name, p)], "use_muon": True, **read[name].keys} for name, p in given.items()]
    return [group for group in groups if group["params"]]


KINDS = ("matrix", "convolution", "adamw")


def sharded_optimizer(twins, split=None, **settings):
    ddp = isinstance(twins.model, DistributedDataParallel)
    params = twins.model if ddp else groups_of(twins.ours, split, twins.readings)
    return distmuon.Muon(params, **{**SETTINGS, **twins.options, **settings})


def matrices_of(tensor, reading):
    """Views of the matrices of a whole parameter as they are stored, in the order of blocks, heads, experts."""
    stored = tensor.flatten(1) if reading.flatten else tensor
    axis = -2 if (reading.split_axis == "rows") != reading.transposed else -1
    sizes = reading.split_sizes or (stored.shape[axis],)
    if reading.interleaved:
        blocks = stored.unflatten(axis, (-1, len(sizes))).unbind(axis)
    else:
        blocks = stored.split(sizes, dim=axis)
    found = []
    for number, block in enumerate(blocks):
        for head in block.chunk(reading.heads_of(number) or 1, dim=axis):
            found += head if head.ndim == 3 else [head]
    return found


class Reference:
    """Optimizers of the whole parameters: Muon of this package unbatched, or of torch, and torch's AdamW.

    Matrices of the parameters that have a reading are parameters of their own here.

    Args:
        twins: Whose whole parameters to optimize.
        oracle: ``"distmuon"`` or ``"torch"``.
        split: See :func:`groups_of`.
        **settings: Those of the sharded optimizer.
    """

    def __init__(self, twins, oracle="distmuon", split=None, **settings):
        self.twins = twins
        settings = {**SETTINGS, **settings}
        self._rest = {name: p for name, p in twins.whole.items() if kind_of(name, p) == "adamw"}
        self._matrices = {name: p for name, p in twins.whole.items() if name not in self._rest}
        self._read, groups = {}, []
        for name, reading in twins.readings.items():
            # contiguous, as nothing else of them is stored beside them
            views = matrices_of(self._matrices.pop(name).detach(), reading)
            self._read[name] = [nn.Parameter(view.clone(memory_format=torch.contiguous_format)) for view in views]
            groups.append({"params": self._read[name], "use_muon": True, "transposed": reading.transposed})
        self._apart = {}
        if oracle == "torch":
            # torch takes matrices alone: views of one memory stand for a stack or a convolution
            for name, param in self._matrices.items():
                views = param.detach() if self._stacked(name) else param.detach().flatten(1)[None]
                self._apart[name] = [nn.Parameter(view) for view in views]
            params = [view for views in self._apart.values() for view in views]
            muon = torch.optim.Muon(params, lr=settings["lr"], weight_decay=settings["weight_decay"])
        else:
            muon = distmuon.Muon(groups_of(self._matrices, split) + groups, **settings)
        self.optimizers = [muon]
        if self._rest:
            adamw = dict(lr=settings["adamw_lr"], weight_decay=settings["adamw_weight_decay"], betas=(0.9, 0.95))
            self.optimizers.append(torch.optim.AdamW(self._rest.values(), foreach=False, **adamw))

    def step(self):
        for name, views in self._apart.items():
            grad = self._matrices[name].grad
            for number, view in enumerate(views):
                whole = grad if grad is None or self._stacked(name) else grad.flatten(1)[None]
                view.grad = None if whole is None else whole[number]
        for name, matrices in self._read.items():
            grad = self.twins.whole[name].grad
            grads = [None] * len(matrices) if grad is None else matrices_of(grad, self.twins.readings[name])
            for matrix, part in zip(matrices, grads, strict=True):
                matrix.grad = None if part is None else part.clone(memory_format=torch.contiguous_format)
        for optimizer in self.optimizers:
            optimizer.step()
        for name, matrices in self._read.items():
            self._put_together(name, matrices, self.twins.whole[name].detach())

    def state(self, name):
        """The state of a parameter as torch's AdamW and our Muon name it; empty if there is none yet."""
        if name in self._rest:
            return self.optimizers[1].state.get(self._rest[name], {})
        if name in self._read:
            states = [self.optimizers[0].state.get(matrix, {}) for matrix in self._read[name]]
            if not any(states):
                return {}
            momentum = torch.empty_like(self.twins.whole[name])
            self._put_together(name, [state["momentum_buffer"] for state in states], momentum)
            return {"momentum_buffer": momentum}
        if name not in self._apart:
            return self.optimizers[0].state.get(self._matrices[name], {})
        found = [self.optimizers[0].state[view]["momentum_buffer"] for view in self._apart[name]]
        return {"momentum_buffer": torch.stack(found).view(self._matrices[name].shape)}

    def _put_together(self, name, matrices, whole):
        for view, matrix in zip(matrices_of(whole, self.twins.readings[name]), matrices, strict=True):
            view.copy_(matrix.detach())

    def _stacked(self, name):
        return self._matrices[name].ndim == 3 and kind_of(name, self._matrices[name]) == "matrix"


# --- gradients and comparison


def full(tensor):
    """The whole of a tensor; ranks of its mesh call this together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(whole, like):
    """What this rank stores of ``whole`` in the layout of ``like``."""
    if not isinstance(like, DTensor):
        return whole.clone()
    chunks = like.__create_chunk_list__()
    if not chunks:
        return whole.new_zeros(like.to_local().shape)
    (chunk,) = chunks
    return whole[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))].clone()


def as_sharded(local, like):
    """The same local elements in the layout of ``like``."""
    if not isinstance(like, DTensor):
        return local
    layout = dict(shape=like.shape, stride=like.stride(), run_check=False)
    return DTensor.from_local(local, like.device_mesh, like.placements, **layout)


def give_gradients(twins, step, missing=None):
    """Draws whole gradients and hands out the parts.

    Args:
        twins: Gets gradients on both sides.
        step: Part of the seed.
        missing: By name: ``"all"``, where nobody has a gradient; else whether this rank's is None, in whose
            place the whole gradient has zeros. Without it no collective is needed.
    """
    for name, param in twins.ours.items():
        absent = missing(name) if missing else False
        if absent == "all":
            param.grad = twins.whole[name].grad = None
            continue
        seed = zlib.crc32(repr((name, step, twins.salt.get(name, 0))).encode())
        drawn = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).to(param.dtype)
        local = part_of(drawn, param)
        param.grad = as_sharded(torch.zeros_like(local) if absent else local, param)
        twins.whole[name].grad = full(param.grad).clone() if missing else drawn
        if absent:
            param.grad = None


def take_gradients(twins):
    """Gives the whole copies the gradients that the layout's own backward left."""
    for name, param in twins.ours.items():
        twins.whole[name].grad = full(param.grad).clone()


def batch(step, rows=8):
    return torch.randint(0, 12, (rows, 5), generator=torch.Generator().manual_seed(100 + step))


def assert_same_bits(twins, optimizer, reference, what=""):
    """Weights and all state are those of the reference to the bit; raises on all ranks or on none."""
    found = []
    for name, param in twins.ours.items():
        label = f"{what}: {name}, {tuple(param.shape)}, {param.dtype}"
        found += _difference(full(param), twins.whole[name].detach(), f"{label}, weights")
        expected, actual = reference.state(name), optimizer.state.get(param, {})
        if set(actual) != set(expected):
            found.append(f"{label}: state {sorted(actual)}, wanted {sorted(expected)}")
        for key in sorted(set(actual) & set(expected)):
            found += _difference(full(actual[key]), expected[key], f"{label}, {key}")
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    texts = [f"rank {rank}: {text}" for rank, texts in enumerate(everywhere) for text in texts]
    assert not texts, "\n".join(texts)


def _difference(actual, expected, what):
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return [f"{what}: {actual.shape} {actual.dtype}, wanted {expected.shape} {expected.dtype}"]
    if torch.equal(actual, expected):
        return []
    apart = (actual.double() - expected.double()).abs()
    count = int((apart != 0).sum())
    return [f"{what}: {count} of {apart.numel()} elements differ, by at most {apart.max().item():.3g}"]


def relative_error(twins, starts):
    """Largest distance of our weights from the reference's, over how far those moved; matrices only."""
    errors = [
        ((full(param) - twins.whole[name]).norm() / (twins.whole[name] - starts[name]).norm()).item()
        for name, param in twins.ours.items()
    ]
    return max(errors)
