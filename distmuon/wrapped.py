"""One optimizer made of two: distmuon.Muon for the matrices, the user's own for the rest."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distmuon.checkpoint.joining import join_state_dicts, packed, split_state_dict
from distmuon.comm.group import Mesh, ProcessGroup
from distmuon.groups import Group, follow_cycled_betas
from distmuon.moving import Origin, Roads, divide, put_back, take_out
from distmuon.muon import Muon
from distmuon.report import RoutingReport, RoutingRow
from distmuon.routing import Route, clean_name


class WrappedMuon(Optimizer):
    """What :func:`distmuon.wrap` returns: Muon for hidden matrices, the user's optimizer for everything else.

    ``param_groups`` holds Muon's groups and then those of the user's optimizer, the same dicts that both parts read,
    and ``state`` is one view of the state of both.

    Attributes:
        muon: Updates the matrices.
        inner: The user's optimizer, of what is left.
        param_groups: Of both. Write into the groups, and add some by :meth:`add_param_group`.
        state: Of both, by parameter.
    """

    def __init__(
        self,
        muon: Muon,
        inner: Optimizer,
        origins: Sequence[Origin],
        routes: dict[str, Route],
        *,
        model: nn.Module,
        routing: dict[str, Any],
        kept: frozenset[str] = frozenset(),
        notes: Sequence[str] = (),
    ) -> None:
        parts = {"muon": muon, "inner": inner, "_origins": list(origins), "_routes": routes}
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._routing = routing
        # a new object takes the way of an unpickled one: torch's __init__ would make groups and state of its own
        self.__setstate__({**parts, "_kept": kept, "_notes": tuple(notes), "defaults": inner.defaults})
        self._lock = _Lock(inner)

    muon: Muon
    inner: Optimizer
    _origins: list[Origin]
    _routes: dict[str, Route]
    _kept: frozenset[str]
    _notes: tuple[str, ...]
    _lock: _Lock | None = None  # copies have none

    @property
    def skipped_steps(self) -> int:
        """Steps that ``on_nonfinite="skip"`` left out since this object was made."""
        return self.muon.skipped_steps

    @property
    def replica_mesh(self) -> Mesh | None:
        """The mesh or process group over which plain parameters are replicated; None where that is not known."""
        return self.muon.replica_mesh

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the matrices, with the other ranks, and then the rest by the user's optimizer.

        With ``on_nonfinite`` the gradients of both parts count, and a step that is left out is so for both.

        Raises:
            RuntimeError: after :func:`distmuon.unwrap`, or if ``param_groups`` or ``state`` was replaced.
            Exception: what :meth:`distmuon.Muon.step` and the user's optimizer raise.
        """
        self._check_parts()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if "betas" in self.defaults:
            follow_cycled_betas(self.muon.param_groups)
        if self.muon.step_beside(self._groups_beside()) and self.inner.param_groups:
            with nullcontext() if self._lock is None else self._lock.opened():
                self.inner.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: hidden matrices of it go to Muon, with the learning rate of the group, the rest to the other.

        With ``use_muon=True`` all of it goes to Muon, with ``use_muon=False`` nothing. Otherwise the rules decide for
        parameters of the model, and for others by their names; what is unknown stays with the user's optimizer.

        Raises:
            TypeError, ValueError: what the part that gets it raises; nothing is added then.
        """
        self._check_parts()
        group = dict(param_group)
        use_muon = group.pop("use_muon", None)
        if use_muon is True:
            self.muon.add_param_group(param_group)
        else:
            self.inner.add_param_group(group)
            self._divide_last(move=use_muon is None)
        self._refresh()

    def _divide_last(self, *, move: bool) -> None:
        """Move the matrices of the group that the user's optimizer got last."""
        group = self.inner.param_groups[-1]
        try:
            roads = self._roads(group) if move else Roads()
            origin, groups = divide(group, roads, len(self.muon.param_groups), self._kept)
            for new in groups:
                self.muon.add_param_group(new)
        except Exception:
            self.inner.param_groups.pop()
            raise
        self._routes.update(roads.routes)
        self._origins.append(origin)
        take_out(self.inner, [origin])

    def _roads(self, group: Group) -> Roads:
        model = self._model()
        if model is not None:
            return Roads.of(model, **self._routing)
        if "param_names" in group:
            return Roads.of(zip(group["param_names"], group["params"], strict=True))
        return Roads()

    def state_dict(self) -> dict[str, Any]:
        """One state dict of both parts, as any torch optimizer has it.

        Muon's groups come first. The others say ``use_muon=False`` and the names of their parameters, so that with
        ``torch.optim.AdamW`` this is the state of :class:`distmuon.Muon` over the same groups.

        Raises:
            RuntimeError: as :meth:`distmuon.Muon.state_dict`.
        """
        self._check_parts()
        if self.inner.state:
            self.muon.complete_state()

        def join_parts(_: Optimizer, __: dict[str, Any]) -> dict[str, Any]:
            return join_state_dicts(self.muon.state_dict(), self.inner.state_dict(), self._names_beside())

        # torch runs the hooks that users registered before and after this one
        handle = self.register_state_dict_post_hook(join_parts, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any], *, changed: str = "error") -> None:
        """Load what :meth:`state_dict` returned, here or in another layout, or the state of :class:`distmuon.Muon`.

        Parameters are found by name where both sides have names, else by position.

        Args:
            state_dict: Of the same two kinds of optimizer.
            changed: As for :meth:`distmuon.Muon.load_state_dict`.

        Raises:
            ValueError: if parameters or groups changed, listing them; nothing is changed then.
        """
        self._check_parts()

        def load_parts(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            names = self._names_beside()
            matrices, rest = split_state_dict(given, self.muon.param_groups, self.inner.param_groups, names, changed)
            self.muon.load_state_dict(matrices, changed=changed)
            self.inner.load_state_dict(rest)
            self._refresh()
            # for torch nothing is left to load
            return {"state": {}, "param_groups": [{"params": group["params"]} for group in packed(self.param_groups)]}

        # torch runs the hooks that users registered before and after this one
        handle = self.register_load_state_dict_pre_hook(load_parts)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def report(self) -> RoutingReport:
        """What each parameter got and why, with effective learning rates as they are now."""
        matrices = self.muon.report()
        rows = [
            dataclasses.replace(row, reason=self._routes[row.name].reason) if row.name in self._routes else row
            for row in matrices.rows
        ]
        for number, (names, group) in enumerate(zip(self._names_beside(), self.inner.param_groups, strict=True)):
            lr = group.get("lr")
            for place, (name, param) in enumerate(zip(names, group["params"], strict=True)):
                route = self._routes.get(name) if name is not None else None
                rows.append(
                    RoutingRow(
                        name=name if name is not None else f"group {number}, parameter {place}",
                        shape=tuple(param.shape),
                        matrices="",
                        algorithm=type(self.inner).__name__,
                        reason=route.reason if route is not None else "not of the model",
                        lr=float("nan") if lr is None else float(lr),
                    )
                )
        return RoutingReport(tuple(rows), (*matrices.notes, *self._notes))

    def owners(self) -> dict[Tensor, int]:
        """As :meth:`distmuon.Muon.owners`."""
        return self.muon.owners()

    def start_owner_gradients(self) -> tuple[dict[Tensor, int], ProcessGroup]:
        """As :meth:`distmuon.Muon.start_owner_gradients`."""
        return self.muon.start_owner_gradients()

    def consolidate_state_dict(self) -> None:
        """As :meth:`distmuon.Muon.consolidate_state_dict`."""
        self.muon.consolidate_state_dict()

    def last_step_stats(self) -> dict[str, float]:
        """As :meth:`distmuon.Muon.last_step_stats`; the step of the user's optimizer is not in it."""
        return self.muon.last_step_stats()

    def effective_lr(self, param: Tensor | str) -> float:
        """As :meth:`distmuon.Muon.effective_lr`; of what the user's optimizer updates, the ``lr`` of its group."""
        wanted = clean_name(param) if isinstance(param, str) else None
        for names, group in zip(self._names_beside(), self.inner.param_groups, strict=True):
            if any(
                known is param or (wanted and wanted == name)
                for known, name in zip(group["params"], names, strict=True)
            ):
                return float(group["lr"])
        return self.muon.effective_lr(param)

    def take_apart(self) -> Optimizer:
        """Put the matrices back and return the user's optimizer; see :func:`distmuon.unwrap`."""
        self._check_parts()
        put_back(self.inner, self._origins, self.muon.param_groups, "lr" not in self._kept)
        self._origins = []
        self.param_groups = []
        if self._lock is not None:
            self._lock.remove()
        return self.inner

    def __getstate__(self) -> dict[str, Any]:
        keys = ("muon", "inner", "_origins", "_routes", "_kept", "_notes", "defaults")
        return {key: self.__dict__[key] for key in keys}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "muon" in state:
            # a copy is of other parameters than the model's
            self.__dict__.setdefault("_model", _nothing)
            super().__setstate__(state)
        # else torch hands over what it read of a state dict, which both parts have loaded already
        self._refresh()

    def _refresh(self) -> None:
        """Look at the groups and the state of both parts anew."""
        self.defaults = self.inner.defaults
        self.param_groups = [*self.muon.param_groups, *self.inner.param_groups]
        self.state = JoinedState(self.muon, self.inner)  # type: ignore[assignment]

    def _names_beside(self) -> list[list[str | None]]:
        """Names of the parameters that the user's optimizer has, by group."""
        return [origin.stayed for origin in self._origins if origin.left_out is None]

    def _groups_beside(self) -> list[Group]:
        """The groups of the user's optimizer, with the names of the model where it knows them all."""
        return [
            {**group, "param_names": names} if all(names) else group
            for group, names in zip(self.inner.param_groups, self._names_beside(), strict=True)
        ]

    def _check_parts(self) -> None:
        if not self._origins:
            raise RuntimeError("this optimizer was taken apart by distmuon.unwrap: use what unwrap returned.")
        groups = [*self.muon.param_groups, *self.inner.param_groups]
        same = len(groups) == len(self.param_groups) and all(map(_is, groups, self.param_groups))
        if not same or not isinstance(self.state, JoinedState):
            raise RuntimeError(
                "param_groups or state of the wrapped optimizer was replaced, or the optimizer inside of it was given "
                "other groups: write into the groups that are there, and use add_param_group and load_state_dict of "
                "the optimizer that distmuon.wrap returned."
            )


class JoinedState(MutableMapping[Tensor, Any]):
    """The state of two optimizers as one mapping; what is written goes to the one that has the parameter."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self._optimizers = optimizers

    def __getitem__(self, param: Tensor) -> Any:
        return self._holder(param)[param]

    def __setitem__(self, param: Tensor, value: Any) -> None:
        self._holder(param)[param] = value

    def __delitem__(self, param: Tensor) -> None:
        del self._holder(param)[param]

    def __contains__(self, param: object) -> bool:
        return any(param in optimizer.state for optimizer in self._optimizers)

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(optimizer.state for optimizer in self._optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _holder(self, param: Tensor) -> MutableMapping[Tensor, Any]:
        for optimizer in self._optimizers:
            if param in optimizer.state:
                return optimizer.state
        for optimizer in self._optimizers:
            if any(param is known for group in optimizer.param_groups for known in group["params"]):
                return optimizer.state
        return self._optimizers[-1].state


class _Lock:
    """Refuses steps of the user's optimizer by itself, which would leave the matrices as they are, without a word."""

    def __init__(self, inner: Optimizer) -> None:
        self._open = False
        self.remove = inner.register_step_pre_hook(self._check).remove

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While the wrapped optimizer steps it."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _check(self, inner: Optimizer, _args: Any, _kwargs: Any) -> None:
        if not self._open:
            raise RuntimeError(
                f"this {type(inner).__name__} was wrapped, and has no matrices of the model any more: call step of "
                "what distmuon.wrap returned (optimizer = distmuon.wrap(model, optimizer)), or distmuon.unwrap first."
            )


def _is(a: object, b: object) -> bool:
    return a is b


def _nothing() -> None:
    """In place of a reference to a model that is not known, as after unpickling."""
