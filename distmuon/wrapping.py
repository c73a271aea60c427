"""From an optimizer that a user has already to Muon for its matrices, and back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from distmuon.comm.group import Mesh, as_group, check_mesh, is_last, replicas_of
from distmuon.groups import Group, refuse_flattened
from distmuon.moving import Origin, Roads, divide, take_out
from distmuon.muon import Muon
from distmuon.numerics.update import resolve_lr_scale
from distmuon.wrapped import WrappedMuon

logger = logging.getLogger("distmuon")

# Settings of AdamW inside of distmuon.Muon, which are the user's optimizer's own here
_OF_THE_OTHER = ("adamw_lr", "adamw_betas", "adamw_eps", "adamw_weight_decay", "fused")

# Names of parameters that a message lists
_TOLD = 5

# Classes that cannot be wrapped, by name since their packages may not be installed, and what to do
_REFUSED = {
    "AcceleratedOptimizer": "wrap the optimizer before accelerator.prepare, which takes what distmuon.wrap returns",
    "ZeroRedundancyOptimizer": "its groups lack the parameters of other ranks: wrap the optimizer that it was made "
    "of, over all parameters, or shard the model by torch.distributed.fsdp.fully_shard",
    "Lookahead": "it keeps a second copy of all parameters: wrap the optimizer inside of it",
}


def wrap(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    adjust_lr_fn: str | None = "match_rms_adamw",
    muon_names: Sequence[str] = (),
    adamw_names: Sequence[str] = (),
    mesh: Mesh | None = None,
    **muon_options: Any,
) -> WrappedMuon:
    """Move the hidden matrices of a model to Muon and leave everything else with the optimizer that has it.

    ::

        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        optimizer = distmuon.wrap(model, optimizer)

    The rules of :mod:`distmuon.routing` choose among the parameters that both the model and the optimizer have. The
    others are left where they are, and :meth:`WrappedMuon.report` lists them. State of what moves is dropped; of what
    stays it is kept. Learning-rate schedulers are made afterwards, of what this returns.

    Args:
        model: As it is trained: plain, DistributedDataParallel, or sharded by ``fully_shard`` or
            ``parallelize_module``.
        optimizer: Any ``torch.optim.Optimizer`` over parameters of the model. Its matrices are taken out of it.
        lr: Learning rate of the matrices, with ``adjust_lr_fn``. None takes that of each matrix's own group, which is
            right for ``"match_rms_adamw"`` and an optimizer of the Adam family, and an error otherwise.
        weight_decay: Decoupled weight decay of the matrices. None takes that of each matrix's own group, 0 where it
            has none.
        adjust_lr_fn: As for :class:`distmuon.Muon`; with ``"match_rms_adamw"`` learning rates of AdamW are right.
        muon_names: Globs of parameter names that go to Muon whatever the rules say.
        adamw_names: Globs of parameter names that stay whatever the rules say.
        mesh: As for :class:`distmuon.Muon`; that of a DistributedDataParallel model is known.
        **muon_options: Further arguments of :class:`distmuon.Muon`, but those of AdamW.

    Returns:
        One optimizer with the groups of Muon before those of ``optimizer``.

    Raises:
        TypeError: for what is no optimizer, one that cannot be taken apart, and arguments that Muon does not have.
        ValueError: for an optimizer that is Muon already, one that a scheduler holds, learning rates that are not those
            of AdamW, and where nothing goes to Muon. The optimizer is unchanged then.
    """
    _check_optimizer(optimizer)
    if not isinstance(model, nn.Module):
        raise TypeError(f"distmuon.wrap takes the model first and its optimizer second, not a {type(model).__name__}.")
    refuse_flattened(model)
    foreign = sorted(muon_options.keys() & set(_OF_THE_OTHER))
    if foreign:
        raise TypeError(
            f"{', '.join(foreign)} would be of AdamW in distmuon.Muon: set them in the optimizer that you wrap."
        )
    if lr is None:
        _check_rate(optimizer, adjust_lr_fn)
    if mesh is None:
        mesh = replicas_of(model)
    routing: dict[str, Any] = {"muon_names": muon_names, "adamw_names": adamw_names}
    routing.update({key: muon_options.pop(key) for key in ("matrices",) if key in muon_options})
    stages = muon_options.get("stages")
    check_mesh("stages", stages)
    routing["last_stage"] = stages is None or is_last(as_group(stages))
    roads = Roads.of(model, **routing)
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    given = {key: value for key, value in settings.items() if value is not None}
    origins, groups = _divide(optimizer, roads, given.keys())
    _check_moving(model, optimizer, origins, groups)
    muon = Muon(groups, adjust_lr_fn=adjust_lr_fn, mesh=mesh, **given, **muon_options)
    notes = _notes(roads, origins)
    dropped = take_out(optimizer, origins)
    if dropped:
        logger.warning(
            "%s is dropped: they start anew on Muon",
            _told(dropped, f"{type(optimizer).__name__}'s state of parameters"),
        )
    return WrappedMuon(
        muon, optimizer, origins, roads.routes, model=model, routing=routing, kept=frozenset(given), notes=notes
    )


def unwrap(optimizer: Optimizer) -> Optimizer:
    """Give back the optimizer that :func:`wrap` got, with every parameter in its group and place again.

    Matrices come back without state; the rest keeps its own. A group that had nothing but matrices comes back with the
    learning rate that they have now. The wrapped optimizer is of no use afterwards.

    Args:
        optimizer: What :func:`wrap` returned.

    Raises:
        TypeError: for another optimizer.
        RuntimeError: if it was taken apart before.
    """
    if not isinstance(optimizer, WrappedMuon):
        raise TypeError(f"distmuon.unwrap takes what distmuon.wrap returned, and this is a {type(optimizer).__name__}.")
    return optimizer.take_apart()


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"distmuon.wrap takes a torch.optim.Optimizer, and this is a {type(optimizer).__name__}: give it the "
            "optimizer that updates the parameters."
        )
    kind = type(optimizer).__name__
    if isinstance(optimizer, WrappedMuon):
        raise ValueError("this optimizer is wrapped already: use it, or call distmuon.unwrap first.")
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _REFUSED:
            raise TypeError(f"{kind} cannot be wrapped: {_REFUSED[cls.__name__]}.")
        if "muon" in cls.__name__.lower():
            raise ValueError(
                f"{kind} is Muon already: build distmuon.Muon(model, ...) in its place, and bring its state along by "
                "distmuon.checkpoint.convert."
            )
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            f"{kind} cannot be wrapped: it looks at all parameters together, several times a step. Wrap "
            "torch.optim.AdamW, or build distmuon.Muon(model, ...)."
        )
    if "step" in vars(optimizer):
        raise ValueError(
            f"something has replaced the step of this {kind}, as a learning-rate scheduler does that is made of it, "
            "and it would not see the groups of Muon: call distmuon.wrap first, and make the scheduler of what it "
            "returns."
        )


def _check_rate(optimizer: Optimizer, adjust_lr_fn: str | None) -> None:
    """Refuse to take a learning rate for that of AdamW which it is not."""
    kind, scale = type(optimizer).__name__, resolve_lr_scale(adjust_lr_fn)
    if scale != "match_rms_adamw":
        raise ValueError(
            f"with adjust_lr_fn={scale!r} the learning rates of {kind} do not suit Muon: pass lr, or leave "
            "adjust_lr_fn out, so that learning rates of AdamW serve both."
        )
    if not any("adam" in cls.__name__.lower() for cls in type(optimizer).__mro__):
        raise ValueError(
            f"the learning rate of {kind} is not one of AdamW, which Muon could take over: pass lr, what AdamW would "
            "have for this model (3e-4 is common)."
        )
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(f"a group of this {kind} has no learning rate: pass lr, what AdamW would have for this model.")


def _divide(optimizer: Optimizer, roads: Roads, kept: Iterable[str]) -> tuple[list[Origin], list[Group]]:
    origins: list[Origin] = []
    groups: list[Group] = []
    for group in optimizer.param_groups:
        origin, moving = divide(group, roads, len(groups), kept)
        origins.append(origin)
        groups.extend(moving)
    return origins, groups


def _check_moving(model: nn.Module, optimizer: Optimizer, origins: Sequence[Origin], groups: Sequence[Group]) -> None:
    kind, names = type(optimizer).__name__, [name for origin in origins for name in origin.names]
    if not any(name is not None for name in names):
        raise ValueError(
            f"none of the {len(names)} parameters of this {kind} is one of the model, which replaces its parameters "
            "when it is sharded by fully_shard: make the optimizer of the model as it is trained, and wrap it then."
        )
    if not groups:
        raise ValueError(
            f"no parameter of this {kind} goes to Muon by the rules: pass muon_names. If the matrices of the model are "
            "1-D here, they were flattened (FSDP1, ZeRO): shard by torch.distributed.fsdp.fully_shard instead."
        )
    moving = {id(param) for group in groups for param in group["params"]}
    for key, value in vars(optimizer).items():
        if key not in ("param_groups", "state") and not moving.isdisjoint(map(id, _held(value))):
            raise TypeError(
                f"{kind} cannot be wrapped: it keeps its parameters in {key!r} too, so that they cannot be taken out. "
                "Make it of what is not on Muon, and distmuon.Muon of the matrices."
            )


def _held(value: Any) -> Iterator[Any]:
    """What a container of an optimizer holds, one level down."""
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value


def _notes(roads: Roads, origins: Sequence[Origin]) -> list[str]:
    """What was left alone, for the report."""
    known = {name for origin in origins for name in origin.names}
    strangers = sum(name is None for origin in origins for name in origin.names)
    lacking = [name for name, route in roads.routes.items() if route.use_muon and name not in known]
    notes = []
    if strangers:
        notes.append(f"{strangers} parameters of the optimizer are not the model's, and stay in it.")
    if lacking:
        notes.append(f"{_told(lacking, 'Matrices that the optimizer does not have')} are left alone.")
    return notes


def _told(names: Sequence[str], what: str) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return f"{what} ({len(names)}: {', '.join(names[:_TOLD])}{more})"
