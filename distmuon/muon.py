"""What is one step: the optimizer."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from distmuon.checkpoint.fitting import fit
from distmuon.checkpoint.loading import place_steps, restore_dtypes
from distmuon.comm.group import (
    Mesh,
    as_group,
    check_mesh,
    distributed,
    is_last,
    replicas_of,
)
from distmuon.groups import (
    Params,
    as_groups,
    check_disjoint,
    check_group,
    check_loaded,
    expand_group,
    fill_defaults,
    follow_cycled_betas,
)
from distmuon.learning_rates import effective_lr
from distmuon.matrices import Matrices
from distmuon.moments import STATE_KEY, moments_dtype
from distmuon.numerics.costs import CostTable
from distmuon.numerics.recipe import Coefficients
from distmuon.options import Options
from distmuon.plan.reading import WHOLE
from distmuon.report import RoutingReport, build_report, nothing_on_muon
from distmuon.rest import complete_state
from distmuon.stats import StepClock, step_stats
from distmuon.stepping import Stepping
from distmuon.values import FAMILY_DEFAULTS

logger = logging.getLogger("distmuon")


class Muon(Stepping):
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
            weight_decay, momentum, nesterov, ns_coefficients, ns_steps, eps, adjust_lr_fn, variant, muon_beta2,
            cautious_wd, block_period, blocks, block_lr_ratio, betas, name``, what its parameters are read as
            (``flatten, transposed, split_sizes, num_heads, split_axis, interleaved``), and with ``use_muon=False``
            ``lmo``: ``"sign"``, ``"col_norm"``, ``"row_norm"`` or ``"bias_rms"`` in place of AdamW (:class:`Scion`).
        lr: Learning rate of the matrices, a number or a 1-element tensor.
        weight_decay: Decoupled weight decay.
        momentum: Weight of the past in the momentum average, in [0, 1).
        nesterov: Nesterov momentum.
        ns_coefficients: ``"auto"`` takes those of the fastest engine, all nearer to ``U V^T`` than the five
            quintic steps of :class:`torch.optim.Muon`; or ``(a, b, c)``, ``"quintic"`` or another name, or one
            tuple a step (docs/orthogonalization.md).
        eps: Smallest Frobenius norm that a matrix is divided by.
        ns_steps: Number of Newton-Schulz iterations; None: as many as the coefficients have, five of a single
            one. With ``ns_coefficients="auto"`` a number asks for so many steps of the quintic.
        adjust_lr_fn: Scale of the learning rate by shape, ``"original"`` (None), ``"match_rms_adamw"``,
            ``"spectral"`` or ``"none"`` (:func:`distmuon.numerics.update.lr_scale`).
        adamw_lr: Learning rate of everything else. None takes ``lr``, which is right only with
            ``adjust_lr_fn="match_rms_adamw"`` and an error otherwise.
        adamw_betas: Decay of AdamW's moments.
        adamw_eps: Added to the root of AdamW's second moment.
        adamw_weight_decay: None takes ``weight_decay``.
        variant: ``"muon"``; ``"normuon"``, whose updates have rows of one size (arXiv 2510.05491); ``"adamuon"``,
            whose elements are divided by the root of their second moment (arXiv 2507.11005). docs/family.md.
        muon_beta2: Weight of the past in the second moments of ``variant``, in [0, 1).
        cautious_wd: Decay only the weights that the step makes smaller (arXiv 2510.12402), of matrices and of the rest.
        block_period: Orthogonalize whole matrices in every so many steps, and ``blocks`` of them by themselves in the
            steps between, which exchanges nothing where ranks store whole blocks: MuonBP (arXiv 2510.16981).
        blocks: Parts of the rows of a matrix, cut as FSDP2 cuts them, so that they are the shards of as many ranks.
        block_lr_ratio: Learning rate of these steps over ``lr``.
        muon_names: Globs of parameter names that go to Muon whatever the rules say.
        adamw_names: Globs of parameter names that go to AdamW whatever the rules say.
        matrices: Which matrices parameters hold (docs/matrices.md): ``"auto"`` takes apart what modules of transformers
            fuse, ``"heads"`` attention heads too, or a dict from name globs to these words or group keys such as
            ``{"*.qkv.weight": {"split_sizes": (4096, 1024, 1024)}}``, later globs over earlier ones. None: each
            ``(m, n)`` weight is one matrix as it is stored.
        momentum_dtype: Dtype of the momentum average; None keeps that of the parameter.
        ns_dtype: Dtype that matrices are rounded to before they are orthogonalized, and that the result has.
            What lies between is in float32 where that is as fast.
        ns_engine: ``"auto"`` takes what is fastest for a shape on this device; ``"standard"``, ``"composed"``,
            ``"gram"``, ``"rational"`` or ``"gram_newton_schulz"``: see :func:`distmuon.orthogonalize`.
        cost_table: How fast the engines are, a file that ``distmuon calibrate`` wrote; None: the built-in table of
            this kind of device. The lowest rank's table counts for all ranks.
        foreach: False updates one tensor at a time, with the operations of :class:`torch.optim.Muon` and
            :class:`torch.optim.AdamW` in their order: the same bits, at their speed.
        fused: Use torch's fused AdamW kernels.
        compile: Run Newton-Schulz of matrices with a single owner through :func:`torch.compile`;
            ``"reduce-overhead"`` with CUDA graphs.
        bucket_bytes: Bound of the matrices, in ``wire_dtype``, that one rank orthogonalizes together.
            Temporary memory is a few times this, or one matrix where a matrix is larger. Within it buckets are cut
            finer where more overlap then pays by the cost table; ``float("inf")`` cuts nothing, so that all matrices
            of a shape are one bucket.
        mesh: A DeviceMesh or process group over which plain parameters are replicated, so that its ranks
            share the work. Inferred when ``params`` is a DistributedDataParallel module; DTensors know
            theirs. Without it, each rank updates its plain parameters alone.
        stages: With pipeline parallelism, the mesh axis or process group that holds one rank of each stage, as
            ``mesh["pp"]``: a step that one stage leaves out (``on_nonfinite``) or cannot take is left out, or raises,
            on all. Costs one small all-reduce a step. Without it, each stage decides alone. The last Linear of an
            ``nn.Sequential`` is a head on the last of its ranks only; ``muon_names`` and ``adamw_names`` say otherwise.
        wire_dtype: Dtype of what travels between ranks. None takes ``ns_dtype``, which changes no bit, as
            matrices are rounded to it anyway.
        replicas: ``"share"`` spreads the matrices over the replicas of HSDP and DDP; ``"repeat"`` lets each
            replica compute all updates for itself, and nothing travels between replicas.
        teams: Whether several ranks may own a matrix together, each a slab of it, where the cost table says that
            a step ends sooner; the update then is that of one owner but for rounding. False: one owner each.
        static_grads: Promise that the same parameters have gradients in every step, on all ranks, from the
            first one on: saves the small all-reduce that asks every rank.
        on_nonfinite: What a gradient with NaN or an infinity on any rank does, before it reaches momentum or a
            parameter: ``"raise"`` raises on all ranks, ``"skip"`` leaves the step out on all ranks and counts it in
            :attr:`skipped_steps`. Reads gradients once more, and waits for the device. None does not look.
        verify_exchange: For debugging: compare checksums of all that matrices and updates send between ranks.
        step_stats: Time the phases of each step, for :meth:`last_step_stats`; waits for the device.
        maximize: Not supported; here to say so by name.

    Attributes:
        skipped_steps: Steps that ``on_nonfinite="skip"`` left out since this object was made.

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
        ns_coefficients: Coefficients = "auto",
        eps: float = 1e-7,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = None,
        *,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        variant: str = "muon",
        muon_beta2: float = 0.95,
        cautious_wd: bool = False,
        block_period: int = 1,
        blocks: int | None = None,
        block_lr_ratio: float = 1.0,
        muon_names: Sequence[str] = (),
        adamw_names: Sequence[str] = (),
        matrices: Matrices = None,
        momentum_dtype: torch.dtype | None = None,
        ns_dtype: torch.dtype = torch.bfloat16,
        ns_engine: str = "auto",
        cost_table: CostTable | str | os.PathLike[str] | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        compile: bool | str = False,
        bucket_bytes: float = 64 << 20,
        mesh: Mesh | None = None,
        stages: Mesh | None = None,
        wire_dtype: torch.dtype | None = None,
        replicas: str = "share",
        teams: bool = True,
        static_grads: bool = False,
        on_nonfinite: str | None = None,
        verify_exchange: bool = False,
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
            ns_engine=ns_engine,
            cost_table=CostTable.load(cost_table) if isinstance(cost_table, str | os.PathLike) else cost_table,
            foreach=foreach,
            fused=fused,
            compile=compile,
            bucket_bytes=bucket_bytes,
            wire_dtype=ns_dtype if wire_dtype is None else wire_dtype,
            replicas=replicas,
            teams=teams,
            static_grads=static_grads,
            on_nonfinite=on_nonfinite,
            verify_exchange=verify_exchange,
            step_stats=step_stats,
        )
        self._begin(StepClock(step_stats))
        check_mesh("mesh", mesh)
        check_mesh("stages", stages)
        self._mesh = replicas_of(params) if mesh is None else mesh
        self._stages = None if stages is None else as_group(stages)
        groups, self._routes = as_groups(
            params,
            muon_names=muon_names,
            adamw_names=adamw_names,
            matrices=matrices,
            last_stage=is_last(self._stages),
        )
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
            "variant": variant,
            "muon_beta2": muon_beta2,
            "cautious_wd": cautious_wd,
            "block_period": block_period,
            "blocks": blocks,
            "block_lr_ratio": block_lr_ratio,
            "block_step": 0,
            "betas": adamw_betas,
            "lmo": None,
            **WHOLE.keys,
            "name": None,
        }
        super().__init__(groups, defaults)
        if not any(group["use_muon"] for group in self.param_groups):
            message = nothing_on_muon(self.report())
            if not distributed():
                raise ValueError(message)
            # a pipeline stage may hold nothing but an embedding and norms, and the other ranks go on
            logger.warning("this rank has nothing on Muon: %s", message)

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
        for group in expanded:
            fill_defaults(group, self.defaults, self._options, label)
            check_group(group, label, self._options)
            super().add_param_group(group)
        self._routes.update(routes)

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
            FloatingPointError: for NaN or an infinity in a gradient on any rank, with ``on_nonfinite="raise"``.
            TypeError: for a sparse gradient.
            ValueError: if ranks disagree about parameters, settings, or which gradients there are.
            RuntimeError: if an exchange with other ranks fails.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        follow_cycled_betas(self.param_groups)
        self._advance()
        return loss

    @torch.no_grad()
    def step_beside(self, groups: Sequence[dict[str, Any]]) -> bool:
        """One step of an optimizer that has another beside it, as that of :func:`distmuon.wrap`.

        Args:
            groups: What the other one updates. Its gradients count for ``on_nonfinite``, and for whether this is the
                dummy step of ``torch.distributed.checkpoint``.

        Returns:
            Whether the step was made; False if ``on_nonfinite="skip"`` left it out, on all ranks.
        """
        return self._advance(groups)

    def last_step_stats(self) -> dict[str, float]:
        """Where the last step spent its time on this rank; empty without ``step_stats=True``.

        Returns:
            Milliseconds ``optim/{agree,pack,wire,ns,unpack,apply,wait,adamw}_ms``, where ``wire`` is spent on
            starting transfers and ``wait`` on waiting for them; ``optim/bytes_sent`` by this rank;
            ``optim/buckets``, how many of them; and ``optim/imbalance``, cost of the busiest rank over the mean.
        """
        if not self._clock.enabled or self._binding is None:
            return {}
        return step_stats(self._clock, [part.latest.pipeline for part in self._binding.parts])

    def state_dict(self) -> dict[str, Any]:
        """As any torch optimizer: ``state`` by parameter index, and ``param_groups``.

        State keys: ``momentum_buffer`` for matrices and what has an ``lmo``; ``second_momentum_buffer`` for matrices
        with a ``variant`` that divides by it; ``step``, ``exp_avg``, ``exp_avg_sq`` for the rest. Groups with a
        ``block_period`` count their steps in ``block_step``. Where some state or a gradient is there, state that is
        still missing is made, zeros, so that what ``torch.distributed.checkpoint`` saves and restores by this is
        complete.

        Raises:
            RuntimeError: if momentum is on its owners only and was not consolidated since the last step.
        """
        self._check_consolidated()
        complete_state(self.param_groups, self.state, self._options)
        return super().state_dict()

    def complete_state(self) -> None:
        """Make the state that the next steps would, zeros, for all trainable parameters that have none."""
        complete_state(self.param_groups, self.state, self._options, begun=True)

    def load_state_dict(self, state_dict: dict[str, Any], *, changed: str = "error") -> None:
        """Load the state of this class, or of :class:`torch.optim.Muon` over the same groups.

        Parameters are found by name where both sides have names, else by position. Momentum is kept in
        ``momentum_dtype`` where that is set. Group keys that the state lacks keep their present values. Whole
        tensors are cut to what a rank stores.

        Args:
            state_dict: What :meth:`state_dict` returned, here or in another layout.
            changed: What to do if parameters moved between Muon and AdamW, were renamed, have another shape, are
                missing or new: ``"error"``, or ``"reset"`` to load what is unchanged by name, however it is
                grouped, and let the others start without state, with a warning that lists them.

        Raises:
            ValueError: if parameters changed, listing them; if the groups differ in number or size, in who updates
                them, or ask for what the engine of this optimizer does not run; nothing is changed then.
        """
        state_dict = fit(state_dict, self.param_groups, changed=changed)
        check_loaded(state_dict["param_groups"], self._options)
        super().load_state_dict(state_dict)
        self._momentum_is_split = False
        place_steps(self, fused=self._options.fused)
        moments = moments_dtype(self._options.wire_dtype)
        restore_dtypes(self, state_dict, {"momentum_buffer": self._options.momentum_dtype, STATE_KEY: moments})

    def effective_lr(self, param: Tensor | str) -> float:
        """The rate that multiplies the update of a parameter, as it is now.

        Args:
            param: A parameter of this optimizer, or its name.

        Returns:
            For a matrix ``lr * scale(shape)``, which all singular values of its update are near; the root mean square
            of its elements is that over ``sqrt(max(rows, cols))``. For what AdamW updates its ``lr``. A tensor ``lr``
            on an accelerator is read, which waits for the device.

        Raises:
            TypeError: for anything else.
            ValueError: for a parameter or a name that this optimizer does not have.
        """
        return effective_lr(self.param_groups, param)

    def report(self) -> RoutingReport:
        """What each parameter got and why, with effective learning rates as they are now."""
        pipelines = [part.pipeline for part in self._binding.parts] if self._binding is not None else []
        return build_report(self.param_groups, self._routes, self._options, pipelines)

    def __getstate__(self) -> dict[str, Any]:
        self._check_consolidated()
        return {**self._copied(), "_lost_mesh": self._mesh is not None or self._stages is not None}

    def _copied(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options, "_routes": self._routes}

    def __deepcopy__(self, memo: dict[int, Any]) -> Muon:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self._copied(), memo))
        clone._momentum_is_split = self._momentum_is_split
        clone._mesh, clone._stages = self._mesh, self._stages  # a process group is shared, not copied
        return clone

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch calls this on a copy, which lacks what is not pickled, and on itself when it loads a state dict
        lost = {"_binding": None, "_mesh": None, "_stages": None, "_momentum_is_split": False, "skipped_steps": 0}
        for key, value in {**lost, "_lost_mesh": False, "_warned_of_no_gradients": False}.items():
            self.__dict__.setdefault(key, value)
        super().__setstate__(state)
        self.__dict__.setdefault("_clock", StepClock(self._options.step_stats))
        # one that was pickled before there were these keys lacks them
        for settings in (self.defaults, *self.param_groups):
            for key, value in {**FAMILY_DEFAULTS, "block_step": 0, "lmo": None}.items():
                settings.setdefault(key, value)

    def _rebind(self) -> None:
        first = self._binding is None
        super()._rebind()
        if first and logger.isEnabledFor(logging.INFO):
            logger.info("routing\n%s", self.report())
