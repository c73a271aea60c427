"""What is one step: the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distmuon.binding import Binding, Part, bind
from distmuon.checkpoint import merge_groups, restore_momentum
from distmuon.comm.group import Mesh
from distmuon.comm.layout import local_gradient, local_tensor
from distmuon.groups import (
    Group,
    Params,
    as_groups,
    check_disjoint,
    check_group,
    expand_group,
    group_names,
)
from distmuon.numerics.adamw import adamw_update, init_state
from distmuon.numerics.coefficients import Coefficients
from distmuon.numerics.hardware import compute_dtype
from distmuon.numerics.update import lr_scale, resolve_lr_scale
from distmuon.options import Options
from distmuon.participation import agree_on_part, check_promise, rates_are_zero
from distmuon.pipeline import LocalParameter
from distmuon.plan.matrices import matrix_spec
from distmuon.report import RoutingReport, RoutingRow, plan_note
from distmuon.stats import StepClock, step_stats

logger = logging.getLogger("distmuon")


class Muon(Optimizer):
    r"""Muon for hidden matrices and AdamW for everything else, in one optimizer.

    A hidden matrix ``W`` with gradient ``G`` is updated by (Keller Jordan,
    https://kellerjordan.github.io/posts/muon)::

        B <- momentum * B + (1 - momentum) * G
        O <- NewtonSchulz((1 - momentum) * G + momentum * B)      with Nesterov, else NewtonSchulz(B)
        W <- (1 - lr * weight_decay) * W - lr * scale(shape) * O

    Embeddings, heads, norms, biases and other parameters take torch's AdamW with ``adamw_lr``.

    The arguments up to ``adjust_lr_fn`` have the names, order and meaning of :class:`torch.optim.Muon`,
    and are the defaults of the Muon groups.

    Args:
        params: A module (the rules of :mod:`distmuon.routing` decide), ``named_parameters()`` (decided by
            name and shape), or parameter groups that say ``use_muon``. A group may set any of ``lr,
            weight_decay, momentum, nesterov, ns_coefficients, ns_steps, eps, adjust_lr_fn, flatten,
            betas, name``.
        lr: Learning rate of the matrices, a number or a 1-element tensor.
        weight_decay: Decoupled weight decay.
        momentum: Weight of the past in the momentum average, in [0, 1).
        nesterov: Nesterov momentum.
        ns_coefficients: Newton-Schulz polynomial: ``(a, b, c)``, a name such as ``"polar_express"``, or
            one tuple a step (:mod:`distmuon.numerics.coefficients`).
        eps: Smallest Frobenius norm that a matrix is divided by.
        ns_steps: Number of Newton-Schulz iterations.
        adjust_lr_fn: Scale of the learning rate by shape, ``"original"`` (None), ``"match_rms_adamw"``,
            ``"spectral"`` or ``"none"`` (:func:`distmuon.numerics.update.lr_scale`).
        adamw_lr: Learning rate of everything else. None takes ``lr``, which is right only with
            ``adjust_lr_fn="match_rms_adamw"`` and an error otherwise.
        adamw_betas: Decay of AdamW's moments.
        adamw_eps: Added to the root of AdamW's second moment.
        adamw_weight_decay: None takes ``weight_decay``.
        muon_names: Globs of parameter names that go to Muon whatever the rules say.
        adamw_names: Globs of parameter names that go to AdamW whatever the rules say.
        momentum_dtype: Dtype of the momentum average; None keeps that of the parameter.
        ns_dtype: Dtype that matrices are rounded to before Newton-Schulz and that it returns. A device
            without such products iterates in float32.
        foreach: False updates one tensor at a time, with the operations of :class:`torch.optim.Muon` and
            :class:`torch.optim.AdamW` in their order: the same bits, at their speed. None and True batch
            matrices of one shape.
        fused: Use torch's fused AdamW kernels.
        compile: Run Newton-Schulz through :func:`torch.compile`.
        bucket_bytes: Bound of the matrices, in ``wire_dtype``, that one rank orthogonalizes together.
            Temporary memory is a few times this, or one matrix where a matrix is larger.
        mesh: A DeviceMesh or process group over which plain parameters are replicated, so that its ranks
            share the work. Inferred when ``params`` is a DistributedDataParallel module; DTensors know
            theirs. Without it, each rank updates its plain parameters alone.
        wire_dtype: Dtype of what travels between ranks. None takes ``ns_dtype``, which changes no bit, as
            matrices are rounded to it anyway.
        replicas: ``"share"`` spreads the matrices over the replicas of HSDP and DDP; ``"repeat"`` lets each
            replica compute all updates for itself, and nothing travels between replicas.
        static_grads: Promise that the same parameters have gradients in every step, on all ranks, from the
            first one on: saves the small all-reduce that asks every rank.
        step_stats: Time the phases of each step, for :meth:`last_step_stats`; waits for the device.
        maximize: Not supported; here to say so by name.

    Raises:
        TypeError: for complex, sparse or quantized parameters.
        ValueError: for values out of range, unknown group keys, a parameter given twice, groups that do
            not say who updates them, and a set of parameters of which none goes to Muon.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        muon_names: Sequence[str] = (),
        adamw_names: Sequence[str] = (),
        momentum_dtype: torch.dtype | None = None,
        ns_dtype: torch.dtype = torch.bfloat16,
        foreach: bool | None = None,
        fused: bool | None = None,
        compile: bool = False,
        bucket_bytes: int = 64 << 20,
        mesh: Mesh | None = None,
        wire_dtype: torch.dtype | None = None,
        replicas: str = "share",
        static_grads: bool = False,
        step_stats: bool = False,
        maximize: bool = False,
    ) -> None:
        if maximize:
            raise ValueError("maximize=True is not supported: negate the loss instead.")
        self._options = Options(
            adamw_lr=adamw_lr,
            adamw_weight_decay=weight_decay if adamw_weight_decay is None else adamw_weight_decay,
            adamw_eps=adamw_eps,
            momentum_dtype=momentum_dtype,
            ns_dtype=ns_dtype,
            foreach=foreach,
            fused=fused,
            compile=compile,
            bucket_bytes=bucket_bytes,
            wire_dtype=ns_dtype if wire_dtype is None else wire_dtype,
            replicas=replicas,
            static_grads=static_grads,
            step_stats=step_stats,
        )
        self._binding: Binding | None = None
        self._clock = StepClock(step_stats)
        self._momentum_is_split = False
        if mesh is None and isinstance(params, DistributedDataParallel):
            mesh = params.process_group
        self._mesh = mesh
        groups, self._routes = as_groups(params, muon_names=muon_names, adamw_names=adamw_names)
        check_disjoint(groups)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "betas": adamw_betas,
            "flatten": False,
            "name": None,
        }
        super().__init__(groups, defaults)
        self._check_some_muon()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its keys.

        A group of named parameters without ``use_muon`` is routed by name, into several groups if need be.

        Raises:
            TypeError: for parameters that cannot be optimized.
            ValueError: for a wrong key or value, or a parameter that the optimizer already has.
        """
        label = f"group {len(self.param_groups)}"
        expanded, routes = expand_group(dict(param_group), label)
        check_disjoint([*self.param_groups, *expanded])
        self._routes.update(routes)
        for group in expanded:
            self._fill_defaults(group, label)
            check_group(group, label)
            super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned.

        All ranks that share parameters call this together.

        Raises:
            TypeError: for a sparse gradient.
            ValueError: if ranks disagree about parameters, settings, or which gradients there are.
            RuntimeError: if an exchange with other ranks fails.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._clock.start()
        for part, active, idle in self._taking_part():
            self._step_part(part, active, create_only=idle)
        return loss

    def owners(self) -> dict[Tensor, int]:
        """The global rank that orthogonalizes each replicated matrix, by parameter.

        Parameters of which several ranks own a part (stacks of experts) and sharded ones are left out. Known
        after the first step; empty on a single process.
        """
        found: dict[Tensor, int] = {}
        for part in self._binding.parts if self._binding is not None else ():
            for place, owner in part.pipeline.plan.sole_owners().items():
                number = part.planned[place]
                if number in part.entries:
                    found[part.entries[number].param] = owner
        return found

    def start_owner_gradients(self) -> tuple[dict[Tensor, int], dist.ProcessGroup]:
        """Prepare for gradients that only owners have, as :func:`distmuon.ddp_hook` leaves them.

        All ranks call this together the first time.

        Returns:
            The owners, and the process group that shares the work.

        Raises:
            ValueError: if plain parameters are not shared over a process group.
        """
        if self._binding is None:
            self._rebind()
        assert self._binding is not None
        part = self._binding.parts[0]
        if part.group is None:
            raise ValueError(
                "ddp_hook needs an optimizer that shares its work: pass the DistributedDataParallel module itself to "
                "distmuon.Muon, or mesh=ddp_model.process_group."
            )
        part.pipeline.owner_gradients = True
        return self.owners(), part.group

    def consolidate_state_dict(self) -> None:
        """Bring momentum that only owners keep to all ranks; needed with :func:`distmuon.ddp_hook` alone.

        All ranks call this together, before :meth:`state_dict`.
        """
        for part in self._binding.parts if self._binding is not None else ():
            if part.group is not None and self._momentum_is_split:
                for param, owner in self.owners().items():
                    if self.state.get(param):
                        dist.broadcast(self.state[param]["momentum_buffer"], src=owner, group=part.group)
        self._momentum_is_split = False

    def last_step_stats(self) -> dict[str, float]:
        """Where the last step spent its time on this rank; empty without ``step_stats=True``.

        Returns:
            Milliseconds ``optim/{agree,pack,wire,ns,unpack,apply,wait,adamw}_ms``, where ``wire`` is spent on
            starting transfers and ``wait`` on waiting for them; ``optim/bytes_sent`` by this rank; and
            ``optim/imbalance``, cost of the busiest rank over the mean.
        """
        if not self._clock.enabled or self._binding is None:
            return {}
        return step_stats(self._clock, [part.pipeline for part in self._binding.parts])

    def state_dict(self) -> dict[str, Any]:
        """As any torch optimizer: ``state`` by parameter index, and ``param_groups``.

        State keys: ``momentum_buffer`` for matrices; ``step``, ``exp_avg``, ``exp_avg_sq`` for the rest.

        Raises:
            RuntimeError: if momentum is on its owners only and was not consolidated since the last step.
        """
        if self._momentum_is_split:
            raise RuntimeError(
                "with distmuon.ddp_hook each rank keeps momentum of its own matrices only: call "
                "optimizer.consolidate_state_dict() on all ranks before state_dict()."
            )
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class, or of :class:`torch.optim.Muon` over the same groups.

        Momentum is kept in ``momentum_dtype`` where that is set. Group keys that the state lacks keep their
        present values.

        Raises:
            ValueError: if the groups differ in number or size, or in who updates them.
        """
        groups = merge_groups(state_dict["param_groups"], self.param_groups)
        super().load_state_dict({**state_dict, "param_groups": groups})
        if self._options.momentum_dtype is not None:
            restore_momentum(self, state_dict, self._options.momentum_dtype)

    def report(self) -> RoutingReport:
        """What each parameter got and why, with effective learning rates as they are now."""
        rows = []
        for index, group in enumerate(self.param_groups):
            label = f"group {index}"
            for name, param in zip(group_names(group, label), group["params"], strict=True):
                route = self._routes.get(name)
                reason = route.reason if route is not None else f"{label} says so"
                lr, matrices = float(group["lr"]), ""
                if group["use_muon"]:
                    spec = matrix_spec(name, param.shape, flatten=group["flatten"])
                    matrices, lr = str(spec), lr * lr_scale(group["adjust_lr_fn"], spec.rows, spec.cols)
                algorithm = "muon" if group["use_muon"] else "adamw"
                rows.append(RoutingRow(name, tuple(param.shape), matrices, algorithm, reason, lr))
        devices = {param.device for group in self.param_groups if group["use_muon"] for param in group["params"]}
        notes = [self._precision_note(device) for device in sorted(devices, key=str)]
        if self._binding is not None:
            notes += [plan_note(part.pipeline.plan, self._options.wire_dtype) for part in self._binding.parts]
        return RoutingReport(tuple(rows), tuple(notes))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options, "_routes": self._routes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch calls this on a copy, which lacks what is not pickled, and on itself when it loads a state dict
        for key, value in {"_binding": None, "_mesh": None, "_momentum_is_split": False}.items():
            self.__dict__.setdefault(key, value)
        super().__setstate__(state)
        self.__dict__.setdefault("_clock", StepClock(self._options.step_stats))

    def _taking_part(self) -> list[tuple[Part, tuple[bool, ...], bool]]:
        """Each part of the binding, which of its parameters take part, and whether only to create state.

        Only the dummy step of DCP and TorchTitan, rates and gradients of zero, creates state alone: they take
        it to make lazy state exist, and counted as a step it would change AdamW's bias correction.
        """
        with self._clock.phase("agree"):
            if self._binding is None:
                self._rebind()
            assert self._binding is not None
            stale = not self._binding.fits(self.param_groups)
            parts = self._binding.parts
            if stale and (self._options.static_grads or all(part.group is None for part in parts)):
                self._rebind()
                return self._taking_part()
            zero_rates = rates_are_zero(self.param_groups, read=not self.state)
            decided: list[tuple[Part, tuple[bool, ...], bool]] = []
            for part in parts:
                if part.active is not None and not zero_rates:
                    check_promise(part)
                    decided.append((part, part.active, False))
                    continue
                agreement = agree_on_part(part, parts, stale=stale, rates_are_zero=zero_rates)
                if agreement.replan:
                    self._rebind()
                    return self._taking_part()
                active = tuple(count > 0 for count in agreement.gradients)
                # what several ranks agreed on, the first part, holds for what this rank has alone
                idle = decided[0][2] if decided else agreement.idle
                if self._options.static_grads and not idle and part.group is not None:
                    part.active = active
                decided.append((part, active, idle))
        return decided

    def _rebind(self) -> None:
        """Read layouts and plan, again when parameters were added or swapped (accelerate swaps them all)."""
        first = self._binding is None
        self.consolidate_state_dict()
        self._binding = bind(self.param_groups, self._options, self._mesh, self._clock)
        if first:
            logger.info("routing\n%s", self.report())

    def _step_part(self, part: Part, active: tuple[bool, ...], *, create_only: bool) -> None:
        for number, entry in part.entries.items():
            if active[number]:
                self._muon_state(entry.param) if entry.fact.use_muon else self._adamw_state(entry.param)
        if create_only:
            return
        local = {
            place: LocalParameter(
                box=entry.fact.layout.box,
                param=local_tensor(entry.param),
                grad=local_gradient(entry.param),
                momentum=local_tensor(self.state[entry.param]["momentum_buffer"]),
            )
            for place, entry in part.matrices
            if active[part.planned[place]]
        }
        part.pipeline.run(self.param_groups, local, [active[number] for number in part.planned])
        self._momentum_is_split |= part.pipeline.owner_gradients
        with self._clock.phase("adamw"):
            for index, group in enumerate(self.param_groups):
                if not group["use_muon"]:
                    members = [
                        entry.param
                        for number, entry in part.entries.items()
                        if entry.fact.group == index and active[number]
                    ]
                    self._step_adamw(group, members)

    def _step_adamw(self, group: Group, params: Sequence[Tensor]) -> None:
        if not params:
            return
        local = [local_tensor(param) for param in params]
        grads = [local_gradient(param) for param in params]
        states = [self.state[param] for param in params]
        adamw_update(
            local,
            # a shard whose gradient other ranks have takes part with zeros
            [torch.zeros_like(mine) if grad is None else grad for mine, grad in zip(local, grads, strict=True)],
            [{key: local_tensor(value) for key, value in state.items()} for state in states],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            foreach=self._options.foreach,
            fused=self._options.fused,
        )

    def _muon_state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            dtype = self._options.momentum_dtype
            state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def _adamw_state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state.update(init_state(param, fused=self._options.fused))
        return state

    def _fill_defaults(self, group: Group, label: str) -> None:
        if not group["use_muon"]:
            if "lr" not in group:
                group["lr"] = self._adamw_lr(label)
            group.setdefault("weight_decay", self._options.adamw_weight_decay)
            group.setdefault("eps", self._options.adamw_eps)
        for key, value in self.defaults.items():
            group.setdefault(key, value)

    def _adamw_lr(self, label: str) -> float | Tensor:
        if self._options.adamw_lr is not None:
            return self._options.adamw_lr
        scale = resolve_lr_scale(self.defaults["adjust_lr_fn"])
        if scale == "match_rms_adamw":
            return self.defaults["lr"]
        raise ValueError(
            f"{label} takes AdamW and has no learning rate: with adjust_lr_fn={scale!r} the rate of the matrices "
            "does not suit AdamW. Pass adamw_lr (3e-4 is common), or adjust_lr_fn='match_rms_adamw', with which "
            "one lr, that of AdamW, serves both."
        )

    def _check_some_muon(self) -> None:
        if any(group["use_muon"] for group in self.param_groups):
            return
        raise ValueError(
            "no parameter goes to Muon:\n"
            f"{self.report()}\n"
            "Pass muon_names or groups with use_muon=True. If the matrices of the model are 1-D here, they were "
            "flattened (FSDP1, ZeRO): shard with torch.distributed.fsdp.fully_shard instead. For AdamW alone "
            "use torch.optim.AdamW."
        )

    def _precision_note(self, device: torch.device) -> str:
        asked = self._options.ns_dtype
        held = asked if self._options.foreach is False else compute_dtype(asked, device)
        note = "" if held is asked else f", iterates in {held}: this device multiplies {asked} in software"
        return f"Newton-Schulz on {device}: {asked}{note}."
