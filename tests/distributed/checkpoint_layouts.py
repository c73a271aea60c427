"""What ranks run to save an optimizer in one layout and load it in another.

Both sides are compared with one process that was never disturbed and has torch's optimizers. Functions return what
they found to be wrong, so that all ranks reach the end.
"""

import contextlib
import warnings
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import (
    SETTINGS,
    TP_PLAN,
    Reference,
    full,
    give_gradients,
    mesh_of,
    part_of,
    sharded_optimizer,
    twins_of,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

BEFORE, AFTER = 2, 2
"""Steps before saving and after loading."""

SAVED = dict(SETTINGS, lr=0.03, momentum=0.9, weight_decay=0.2, adamw_lr=0.004, adamw_betas=(0.8, 0.97))
"""Settings of the run that saves; the one that loads is built with others and must take these over."""


class Model(nn.Module):
    """Sizes that 3 and 4 do not divide, a matrix of fewer rows than ranks, a stack of experts, a kernel."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.up = nn.Linear(7, width)
        self.down = nn.Linear(width, 7)
        self.few = nn.Linear(7, 2)
        self.experts = nn.Parameter(torch.randn(3, 5, 7))
        self.conv = nn.Conv1d(7, 5, 3, bias=False)
        self.norm = nn.LayerNorm(7)


def model_of(seed, dtype, width):
    torch.manual_seed(seed)
    return Model(width).to(dtype)


def fsdp(model):
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh_of(dist.get_world_size()))
    return model


def hsdp(model):
    return fully_shard(model, mesh=mesh_of(2, 2))


def tensor_parallel(model):
    parallelize_module(model, mesh_of(2, 2)["inner"], TP_PLAN)
    return fully_shard(model, mesh=mesh_of(2, 2)["outer"])


LAYOUTS = {
    "fsdp4": (4, fsdp),
    "fsdp3": (3, fsdp),
    "fsdp2": (2, fsdp),
    "fsdp1": (1, fsdp),
    "hsdp2x2": (4, hsdp),
    "tp2xfsdp2": (4, tensor_parallel),
    "ddp2": (2, DistributedDataParallel),
    "plain": (0, lambda model: model),
}
"""Number of ranks, and what is done to the model; 0: a process without a group."""


@dataclass(frozen=True)
class Case:
    """What the runs that save and load have in common.

    Attributes:
        settings: Of both optimizers, and of the undisturbed ones.
        dtype: Of the model.
        width: Rows of a matrix. Tensor parallelism shards them first, and torch cannot lay out a whole tensor over
            uneven shards of such shards.
        oracle: See ``layouts.Reference``.
        missing: Parameters that get no gradient before saving.
    """

    settings: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    width: int = 10
    oracle: str = "torch"
    missing: tuple = ()


UNEVEN, EVEN = Case(), Case(width=8)


class Run:
    """A model and its optimizer in a layout, beside the undisturbed process.

    Args:
        layout: Of ``LAYOUTS``.
        case: What it is of.
        ours: Settings of the sharded optimizer alone.
        seed: Of the sharded model.
    """

    def __init__(self, layout, case, ours=None, seed=1):
        whole = model_of(1, case.dtype, case.width)
        self.twins = twins_of(LAYOUTS[layout][1](model_of(seed, case.dtype, case.width)), whole)
        self.twins.ours = {name.removeprefix("module."): param for name, param in self.twins.ours.items()}
        self.settings = {**SAVED, **case.settings}
        self.optimizer = sharded_optimizer(self.twins, **{**self.settings, **(ours or {})})
        self.reference = undisturbed(self.twins, self.settings, case.oracle)
        self.missing = case.missing

    @property
    def model(self):
        return self.twins.model

    def steps(self, numbers, *, ours=True):
        """What differs after the last step; ``ours`` False: only the undisturbed process goes on."""
        for step in numbers:
            give_gradients(self.twins, step)
            for name in self.missing if step < BEFORE else ():
                self.twins.ours[name].grad = self.twins.whole[name].grad = None
            if ours:
                self.optimizer.step()
            self.reference.step()
        for param in self.twins.ours.values():
            param.grad = None
        return self.differences(stored) if ours else []

    def differences(self, part=None):
        """Parameters and state that are not the bits of the undisturbed process.

        Args:
            part: Compares what :func:`stored` leaves of both; None: tensors are gathered whole.
        """
        part, found = part or gathered, []
        for name, param in self.twins.ours.items():
            wanted, kept = self.reference.state(name), self.optimizer.state.get(param, {})
            if set(kept) != set(wanted) and not (name in self.missing and not wanted):
                found.append(f"{name} has the state {sorted(kept)}, wanted {sorted(wanted)}")
            pairs = [(name, param, self.twins.whole[name].detach())]
            pairs += [(f"{key} of {name}", kept[key], wanted[key]) for key in sorted(set(kept) & set(wanted))]
            for what, actual, expected in pairs:
                found += differs(what, *part(actual.detach(), expected))
        return found


def gathered(actual, expected):
    return full(actual), expected


def stored(actual, expected):
    """What this rank stores, and what it should."""
    return local(actual), part_of(expected, actual)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def undisturbed(twins, settings, oracle):
    reference = Reference(twins, oracle, **settings)
    for group in reference.optimizers[0].param_groups:
        group["momentum"] = settings["momentum"]
    for optimizer in reference.optimizers[1:]:
        for group in optimizer.param_groups:
            group["betas"] = settings["adamw_betas"]
    return reference


def differs(what, actual, expected):
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return [f"{what}: {actual.shape} {actual.dtype}, wanted {expected.shape} {expected.dtype}"]
    return [] if torch.equal(actual, expected) else [f"{what}: off by {(actual - expected).abs().max():.2g}"]


# --- saving and loading

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def no_dist():
    return not dist.is_initialized()


@contextlib.contextmanager
def quiet():
    """DCP warns where there is one process, which is on purpose here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save_sharded(run, folder, options=None):
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    with quiet():
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder, no_dist=no_dist())


def load_sharded(run, folder, options=None):
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    loaded = {"model": model, "optimizer": optimizer}
    with quiet():
        dcp.load(loaded, checkpoint_id=folder, no_dist=no_dist())
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )


def save_full(run, file):
    model, optimizer = get_state_dict(run.model, run.optimizer, options=FULL)
    if no_dist() or dist.get_rank() == 0:
        torch.save({"model": model, "optimizer": optimizer}, file)
    barrier()


def load_full(run, file, broadcast):
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    reads = not broadcast or dist.get_rank() == 0
    loaded = torch.load(file, weights_only=True) if reads else {"model": {}, "optimizer": {}}
    # set_state_dict would take ranks without a model's state for ones that load the optimizer alone, and hang
    set_model_state_dict(run.model, loaded["model"], options=options)
    set_optimizer_state_dict(run.model, run.optimizer, loaded["optimizer"], options=options)


def barrier():
    if not no_dist():
        dist.barrier()


def save(layout, folder, case):
    """Trains and saves in each way; what was not that of the undisturbed process."""
    run = Run(layout, case)
    found = run.steps(range(BEFORE))
    save_sharded(run, folder / "sharded")
    save_sharded(run, folder / "flat", FLAT)
    save_full(run, folder / "full.pt")
    if layout in ("ddp2", "plain") and (no_dist() or dist.get_rank() == 0):
        torch.save({"model": whole_state(run), "optimizer": run.optimizer.state_dict()}, folder / "plain.pt")
    barrier()
    return found + run.steps(range(BEFORE, BEFORE + AFTER))


def whole_state(run):
    module = run.model.module if isinstance(run.model, DistributedDataParallel) else run.model
    return module.state_dict()


# --- what else saving and loading must not change


def dummy_step(layout):
    """The step of DCP on a fresh optimizer, and the same by hand as trainers make it: state, and nothing else."""
    found = []
    for way in ("dcp", "flat", "by hand"):
        run = Run(layout, UNEVEN)
        if way == "by hand":
            rates = [group["lr"] for group in run.optimizer.param_groups]
            for param in run.twins.ours.values():
                param.grad = torch.zeros_like(param)
            for group in run.optimizer.param_groups:
                group["lr"] = 0.0
            run.optimizer.step()
            run.optimizer.zero_grad()
            for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        else:
            get_optimizer_state_dict(run.model, run.optimizer, options=FLAT if way == "flat" else None)
        here = []
        for name, param in run.twins.ours.items():
            here += differs(name, *stored(param.detach(), run.twins.whole[name].detach()))
            state = run.optimizer.state.get(param, {})
            if set(state) not in ({"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}):
                here.append(f"{name} has the state {sorted(state)}")
            here += [f"{key} of {name} is not zero" for key, value in state.items() if local(value).any()]
        here += run.steps(range(3))
        found += [f"{way}: {text}" for text in here]
    return found


def other_plan(layout, folder, ours, teams):
    """Saves an optimizer of other buckets, owners or teams, and loads it into one of none; how their state differs.

    ``teams``: whether matrices of the one that saves must be owned by teams.
    """
    seen = {}
    for kind, settings in (("other", ours), ("default", {})):
        run = Run(layout, UNEVEN, dict(foreach=None, ns_dtype=torch.float32, **settings), seed=7 if seen else 1)
        if not seen:
            for step in range(BEFORE):
                give_gradients(run.twins, step)
                run.optimizer.step()
            save_sharded(run, folder)
            plans = [part.pipeline.plan for part in run.optimizer._binding.parts]
            found = [] if teams == any(bucket.parts > 1 for plan in plans for bucket in plan.buckets) else ["no teams"]
        else:
            load_sharded(run, folder)
        seen[kind] = run
    saved, loaded = seen["other"], seen["default"]
    for name, param in saved.twins.ours.items():
        twin = loaded.twins.ours[name]
        found += differs(name, local(twin.detach()), local(param.detach()))
        for key, value in saved.optimizer.state[param].items():
            found += differs(f"{key} of {name}", local(loaded.optimizer.state[twin][key]), local(value))
    return found


def loaded_without_torch(source, target):
    """What plain ``load_state_dict`` says to the sharded tensors of another layout; empty if nothing."""
    saved = Run(source, UNEVEN)
    saved.steps(range(1))
    run = Run(target, UNEVEN)
    try:
        run.optimizer.load_state_dict(saved.optimizer.state_dict())
    except ValueError as error:
        return [str(error)]
    return []


OTHER = dict(lr=0.5, momentum=0.1, weight_decay=0.9, adamw_lr=0.7, adamw_betas=(0.1, 0.2))


def load(layout, folder, ways, case, ours=None, gradients=False):
    """Loads in some ways, each into another model and optimizer, and goes on; what is not as if never disturbed.

    Args:
        layout: Of ``LAYOUTS``.
        folder: Where :func:`save` wrote.
        ways: Of ``sharded``, ``flat``, ``full``, ``broadcast`` and ``plain``.
        case: That of the run that saved.
        ours: What the optimizer that loads is told otherwise; None: ``OTHER``.
        gradients: Whether there are some while it loads.
    """
    found = []
    for way in ways:
        run = Run(layout, case, OTHER if ours is None else ours, seed=7)
        run.steps(range(BEFORE), ours=False)
        if gradients:
            give_gradients(run.twins, 99)
        if way in ("sharded", "flat"):
            load_sharded(run, folder / way, FLAT if way == "flat" else None)
        elif way == "plain":
            loaded = torch.load(folder / "plain.pt", weights_only=True)
            set_model_state_dict(run.model, loaded["model"], options=StateDictOptions(full_state_dict=True))
            run.optimizer.load_state_dict(loaded["optimizer"])
        else:
            load_full(run, folder / "full.pt", broadcast=way == "broadcast")
        here = run.differences() + wrong_settings(run.optimizer, run.settings)
        here += [f"later: {text}" for text in run.steps(range(BEFORE, BEFORE + AFTER))]
        found += [f"{way}: {text}" for text in here]
    return found


def wrong_settings(optimizer, settings):
    found = []
    for index, group in enumerate(optimizer.param_groups):
        kind = "lr" if group["use_muon"] else "adamw_lr"
        wanted = {"lr": settings[kind], "momentum": settings["momentum"], "betas": settings["adamw_betas"]}
        wanted["weight_decay"] = settings["weight_decay" if group["use_muon"] else "adamw_weight_decay"]
        found += [f"group {index} has {k}={group[k]}, wanted {v}" for k, v in wanted.items() if group[k] != v]
    return found
