"""QK-Clip beside an optimizer: maxima from the forward passes, factors after the step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distmuon.comm.group import Mesh, ProcessGroup, compute_device, replicas_of
from distmuon.comm.layout import as_dtensor, read_layout
from distmuon.comm.maxima import group_of_maxima, largest_over_ranks_
from distmuon.muon import Muon
from distmuon.qk_clip.apply import Scaler, parts_in
from distmuon.qk_clip.discover import find_attention, given_attention
from distmuon.qk_clip.factors import check_options, factor_table, head_factors
from distmuon.qk_clip.heads import Heads, check_heads
from distmuon.qk_clip.implementation import Recording, install
from distmuon.qk_clip.maxima import Maxima
from distmuon.qk_clip.record import record_max_logits
from distmuon.routing import clean_name
from distmuon.wrapped import WrappedMuon


def attach_qk_clip(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    tau: float = 100.0,
    alpha: float = 0.5,
    gqa: str = "group",
    every: int = 1,
    qk_norm: str = "refuse",
    layout: str | None = None,
    attention: Mapping[str, Heads] | None = None,
    mesh: Mesh | None = None,
) -> QKClip:
    r"""Bound the attention logits of a model by ``tau``, as QK-Clip of Kimi K2 does (arXiv 2507.20534).

    After each optimizer step, a head whose largest logit ``S`` of the step's batch was above ``tau`` has its rows of
    ``W_q`` and ``W_k``, and of their biases, multiplied by ``gamma^alpha`` and ``gamma^(1 - alpha)``, where
    ``gamma = tau / max(S, tau)``. Momentum is left alone. Steps that ``on_nonfinite="skip"`` leaves out change nothing
    and forget their maxima. A step that a GradScaler leaves out does not reach the optimizer: its maxima count in the
    next one, for the same weights, unless :meth:`QKClip.reset` is called.

    Layers of transformers are found, and their attention (eager, sdpa or flex_attention) recorded by an implementation
    that calls it; nothing of the model is edited. For models of your own, say by ``attention`` which modules they are
    and call :meth:`QKClip.record` in their forward pass.

    Args:
        model: Before or after it is sharded or wrapped; the DistributedDataParallel module tells which ranks share it.
        optimizer: After whose steps to clip; None: call :meth:`QKClip.step` yourself.
        tau: Bound of the logits.
        alpha: The queries' share of a factor.
        gqa: Where query heads share a key, ``"group"`` scales them and the key as the loudest of them needs;
            ``"query"`` each query head by its own factor and the key not.
        every: Record and clip in every so many steps, starting with the first.
        qk_norm: Layers that normalize queries and keys after the projections (Qwen3, Gemma 3), whose scale is then of
            no consequence: ``"refuse"``, or ``"gain"`` to scale the gain of the norms instead.
        layout: Of fused projections in classes that are not known here: ``"sectioned"`` or ``"interleaved"``.
        attention: From globs of module paths to how they keep their heads (``distmuon.qk_clip.heads``), in place of
            what would be found.
        mesh: The mesh or process group over which plain parameters are replicated. Known for a
            DistributedDataParallel model, and from a :class:`distmuon.Muon` that knows it; DTensors know theirs.

    Returns:
        The handle, with metrics, and :meth:`QKClip.detach`.

    Raises:
        TypeError: for what is no module, and settings that are no numbers.
        ValueError: for settings out of range, a model without attention that is known, layers that normalize queries
            and keys, fused projections of unknown order, another attention implementation, and an optimizer that
            updates none of the projections.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach_qk_clip takes the model first, then its optimizer, and got a {type(model).__name__}.")
    check_options(tau, alpha, gqa)
    if every < 1:
        raise ValueError(f"every={every}: give the number of steps from one clip to the next, 1 or more.")
    if qk_norm not in ("refuse", "gain"):
        raise ValueError(f'qk_norm={qk_norm!r}: give "refuse" or "gain".')
    if attention is None:
        found = find_attention(model, layout=layout, qk_norm=qk_norm)
    else:
        found = given_attention(model, attention)
    layers = [
        Layer(clean_name(path), model.get_submodule(path), heads, Scaler(heads, alpha, gqa))
        for path, heads in found.items()
    ]
    layers = [layer for layer in layers if layer.is_trained()]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no trained attention layer that QK-Clip knows: name its modules by attention=."
        )
    if optimizer is not None:
        _check_optimizer(optimizer, layers)
    if mesh is None:
        mesh = replicas_of(model)
    if mesh is None and isinstance(optimizer, Muon | WrappedMuon):
        mesh = optimizer.replica_mesh
    handle = QKClip(layers, tau, gqa, every, mesh)
    handle.attach(optimizer)
    return handle


@dataclass
class Layer:
    """One attention layer.

    Attributes:
        name: Path of the module, without what wrappers add.
        module: It.
        heads: How it keeps its heads.
        scaler: What scales them.
    """

    name: str
    module: nn.Module
    heads: Heads
    scaler: Scaler

    def __post_init__(self) -> None:
        check_heads(repr(self.name), self.heads)

    def is_trained(self) -> bool:
        """Whether its projections are trained.

        Raises:
            ValueError: if some are and some are not.
        """
        trained = {tensor.requires_grad for (_, number), tensor in self.parts().items() if number == 0}
        if len(trained) == 2:
            raise ValueError(
                f"{self.name!r} trains some of {self.heads.parts} and not others: QK-Clip scales all of them."
            )
        return trained == {True}

    def parts(self) -> dict[tuple[str, int], Tensor]:
        """Its weights and biases as they are now: FSDP, for one, swaps them."""
        return dict(parts_in(self.module, self.heads))

    def first_head(self, count: int) -> int:
        """Number of the first of ``count`` query heads that this rank computes, with tensor parallelism."""
        if count == self.heads.num_heads:
            return 0
        part = self.heads.parts[0]
        weight = self.parts()[part, 0]
        if as_dtensor(weight) is None or len(self.heads.parts) == 1:
            raise ValueError(
                f"{self.name!r} computed {count} of {self.heads.num_heads} heads, and its {part!r} does not say which: "
                "give it a DTensor of rows, as tensor parallelism of torch does."
            )
        return read_layout(self.name, weight, None).box.offsets[0] * self.heads.num_heads // weight.shape[0]


def _check_optimizer(optimizer: Optimizer, layers: list[Layer]) -> None:
    """Refuse an optimizer of another model, or of copies, which would undo the clip with its next step."""
    updated = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = [tensor for layer in layers for tensor in layer.parts().values()]
    if _any_sharded(updated) and not _any_sharded(tensors):
        return  # FSDP holds whole parameters since a forward pass, and the optimizer has the shards
    if not {id(tensor) for tensor in tensors} & {id(param) for param in updated}:
        raise ValueError(
            f"the {type(optimizer).__name__} updates none of the attention projections, such as those of "
            f"{layers[0].name!r}: it was made of another model, before fully_shard, or of copies of the parameters. "
            "Give the one that updates them; for copies call distmuon.qk_clip_ on these."
        )


def _any_sharded(tensors: list[Tensor]) -> bool:
    return any(as_dtensor(tensor) is not None for tensor in tensors)


class QKClip:
    """What :func:`attach_qk_clip` returns.

    Attributes:
        recording: Whether forward passes are recorded in this step.
    """

    def __init__(self, layers: list[Layer], tau: float, gqa: str, every: int, mesh: Mesh | None) -> None:
        self._layers = layers
        self._numbers = {layer.name: number for number, layer in enumerate(layers)}
        self._tau, self._gqa, self._every, self._mesh = tau, gqa, every, mesh
        self._maxima = Maxima([layer.heads.num_heads for layer in layers])
        self._group: ProcessGroup | None = None
        # a compiled forward pass is guarded by this, and would not be by a count of steps
        self.recording = True
        self._steps = 0
        self._skipped = 0
        self._last: Tensor | None = None
        self._clips: Tensor | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the attention layers that are clipped."""
        return tuple(self._numbers)

    def attach(self, optimizer: Optimizer | None) -> None:
        """Record, and clip after the steps of ``optimizer``; :func:`attach_qk_clip` has done it."""
        sites = {layer.module: _Site(self, number) for number, layer in enumerate(self._layers)}
        self._undo.append(install(sites))
        if optimizer is not None:
            self._skipped = _skipped_steps(optimizer)
            self._undo.append(optimizer.register_step_post_hook(self._after_step).remove)

    def detach(self) -> None:
        """Give the model its attention back, and leave the optimizer alone."""
        while self._undo:
            self._undo.pop()()

    def record(
        self,
        layer: str,
        q: Tensor,
        k: Tensor,
        scale: float | None = None,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> None:
        """Record the logits of one forward pass of a layer, unless it is in evaluation or the step is not recorded.

        Args:
            layer: Its path.
            q: As for :func:`record_max_logits`, as are the others.
            k: Keys.
            scale: Of the products.
            mask: What is visible.
            is_causal: Whether queries see no later keys.
        """
        module = self._layers[self._number(layer)].module
        if self.recording and module.training:
            self.update(layer, record_max_logits(q, k, scale, mask, is_causal=is_causal))

    def update(self, layer: str, max_logits: Tensor) -> None:
        """Take maxima that a kernel found.

        Args:
            layer: Path of the layer.
            max_logits: float32 ``(heads,)``, scaled and of visible positions alone; with tensor parallelism of the
                heads of this rank.
        """
        if self.recording:
            self._take(self._number(layer), max_logits)

    @torch.no_grad()
    def step(self) -> None:
        """Clip, and begin to record anew; all ranks that share parameters call this together, after the step.

        With an optimizer its hook does this. In a step that is not recorded nothing happens, and nothing is sent.

        Raises:
            ValueError: for plain parameters whose copies on other ranks are not known.
            RuntimeError: if the ranks do not come together.
        """
        if self.recording:
            self._clip()
        self._begin()

    def reset(self) -> None:
        """Forget what was recorded since the last step."""
        self._maxima.reset()

    def resume(self, steps: int) -> None:
        """Go on after so many steps of another process, with ``every`` in its turn; metrics begin anew.

        Call it after optimizer state is loaded, as ``torch.distributed.checkpoint`` makes a step to load into.

        Args:
            steps: How many were made before, those that were left out too.
        """
        self._last = self._clips = None
        self._steps = steps - 1
        self._begin()

    def last_max_logits(self) -> dict[str, Tensor]:
        """The largest logits of each layer in the last recorded step, of all ranks and before it was clipped.

        Returns:
            float32 ``(heads,)`` on the device by path of the layer, -inf where nothing was seen; empty before the
            first step.
        """
        if self._last is None:
            return {}
        parts = self._last.split(list(self._maxima.sizes))
        return {layer.name: part for layer, part in zip(self._layers, parts, strict=True)}

    def metrics(self) -> dict[str, float]:
        """Numbers for a log; waits for the device.

        Returns:
            ``qk_clip/max_logit`` of the last recorded step; ``qk_clip/clipped_heads``, how many of its heads were
            above tau; ``qk_clip/clips``, how often heads were, since the handle was made; empty before the first step.
        """
        if self._last is None or self._clips is None:
            return {}
        numbers = torch.stack([self._last.amax(), (self._last > self._tau).sum().float(), self._clips.float()])
        return dict(zip(("qk_clip/max_logit", "qk_clip/clipped_heads", "qk_clip/clips"), numbers.tolist(), strict=True))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        skipped, self._skipped = self._skipped, _skipped_steps(optimizer)
        if self._skipped != skipped:
            # nothing was updated, on all ranks, and of such a batch the maxima may be anything
            self._begin()
            return
        self.step()

    def _begin(self) -> None:
        self._maxima.reset()
        self._steps += 1
        self.recording = self._steps % self._every == 0

    def _take(self, number: int, max_logits: Tensor) -> None:
        self._maxima.collect(number, max_logits, self._layers[number].first_head(max_logits.numel()))

    def _clip(self) -> None:
        parts = [layer.parts() for layer in self._layers]
        tensors = [tensor for of_layer in parts for tensor in of_layer.values()]
        if self._group is None:
            self._group = group_of_maxima(tensors, self._mesh)
        meshes = [dtensor.device_mesh for dtensor in map(as_dtensor, tensors) if dtensor is not None]
        values = self._maxima.on(compute_device(meshes, tensors[0].device))
        if self._group is not None:
            largest_over_ranks_(values, self._group, "the largest attention logits of all ranks")
        for layer, of_layer, part in zip(self._layers, parts, values.split(list(self._maxima.sizes)), strict=True):
            layer.scaler.scale(of_layer, factor_table(head_factors(part, self._tau), layer.heads, self._gqa))
        self._last = values.clone()
        clips = (values > self._tau).sum()
        self._clips = clips if self._clips is None else self._clips + clips

    def _number(self, layer: str) -> int:
        if layer not in self._numbers:
            raise ValueError(f"{layer!r} is no layer that QK-Clip was attached to: those are {', '.join(self.layers)}.")
        return self._numbers[layer]


class _Site(Recording):
    """Where a layer records; the handle belongs to the user, and is not kept alive by it."""

    def __init__(self, handle: QKClip, number: int) -> None:
        self._handle, self._number = weakref.ref(handle), number

    def wanted(self) -> bool:
        handle = self._handle()
        return handle is not None and handle.recording

    def take(self, max_logits: Tensor) -> None:
        handle = self._handle()
        if handle is not None:
            handle._take(self._number, max_logits)


def _skipped_steps(optimizer: Optimizer) -> int:
    return optimizer.skipped_steps if isinstance(optimizer, Muon | WrappedMuon) else 0
