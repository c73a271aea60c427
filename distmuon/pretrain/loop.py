"""The training loop: steps, and between them logs, validations and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import distmuon
from distmuon.pretrain.batch import BatchPlan
from distmuon.pretrain.checkpoint import AppState, Saver
from distmuon.pretrain.config import Config
from distmuon.pretrain.evaluate import Validation, language_model_loss
from distmuon.pretrain.finite import FiniteGuard
from distmuon.pretrain.interrupt import Interrupted, InterruptGuard
from distmuon.pretrain.memory import peak_memory_gib
from distmuon.pretrain.metrics import Record
from distmuon.pretrain.optimizer import clip_metrics, learning_rates, step_stats
from distmuon.pretrain.parallel import Layout
from distmuon.pretrain.phase import phase
from distmuon.pretrain.precision import autocast, synchronize
from distmuon.pretrain.processes import average_, largest
from distmuon.pretrain.report import BITS_PER_BYTE, TRAIN_LOSS, VALIDATION_LOSS
from distmuon.pretrain.sharding import Placed, settle_gradients
from distmuon.qk_clip.attach import QKClip


@dataclass
class Parts:
    """What the loop works with.

    Attributes:
        config: All settings.
        plan: Sizes of a step.
        layout: Arrangement of the processes.
        placed: The model, in training mode on ``device``.
        optimizer: Its optimizer.
        qk_clip: What keeps attention logits in bounds after its steps; None: nothing does.
        routing: What it does to which parameter, as a sentence and a table.
        scheduler: Its learning rates.
        loader: This rank's endless training batches of ``device_batch`` sequences.
        state: What checkpoints hold; its ``progress`` says where to start.
        device: Of the model.
        dtype: Of the forward pass.
        flops_per_token: Model FLOPs of a trained token.
        peak_flops: Of the device, FLOP/s; None where it is not known.
    """

    config: Config
    plan: BatchPlan
    layout: Layout
    placed: Placed
    optimizer: Optimizer
    qk_clip: QKClip | None
    routing: tuple[str, str]
    scheduler: LambdaLR
    loader: Iterable[dict[str, Tensor]]
    state: AppState
    device: torch.device
    dtype: torch.dtype
    flops_per_token: float
    peak_flops: float | None


@dataclass
class Hooks:
    """What the loop calls, on every rank.

    Attributes:
        advance: After each step, with the number of steps done.
        record: With each record of metrics, the same on all ranks but for times and memory.
        validate: Runs a validation.
        saver: Saves checkpoints; None with checkpoints switched off.
    """

    advance: Callable[[int], None]
    record: Callable[[Record], None]
    validate: Callable[[], Validation]
    saver: Saver | None


class Loop:
    """Runs the steps that are left.

    Args:
        parts: What it works with.
        hooks: What it calls.
    """

    def __init__(self, parts: Parts, hooks: Hooks) -> None:
        self._parts, self._hooks = parts, hooks
        self._batches = iter(parts.loader)
        self._finite = FiniteGuard(parts.config, parts.optimizer, parts.device)
        self._watch = _StopWatch(parts.state.progress["seconds"])
        self._last = _Window(int(parts.state.progress["step"]), self._watch.seconds)

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: If a signal came; the state is saved then.
            AgreedError: If the loss or its gradient is not finite.
            RankLost: If another rank ended or stalled.
        """
        steps, every = self._parts.plan.steps, self._parts.config.checkpoint.every
        step = int(self._parts.state.progress["step"])
        with InterruptGuard() as guard:
            self._watch.start()
            while step < steps:
                step += 1
                self._step(step)
                signum = self._signal(guard, step)
                stop = signum > 0 and step < steps
                checkpoint, saver = None, self._hooks.saver
                if saver is not None:
                    with phase("checkpoint", step):
                        saver.poll()
                if saver is not None and (stop or step == steps or step % every == 0):
                    self._finite.check()
                    self._watch.stop()
                    self._parts.state.progress["seconds"] = self._watch.seconds
                    with phase("checkpoint", step):
                        checkpoint = saver.save(step)
                        if stop or step == steps:
                            saver.wait()
                    self._watch.start()
                    if not stop and step < steps:
                        # one that came while the state was saved needs no further step
                        signum = self._signal(guard, step)
                        stop = signum > 0
                if stop:
                    if saver is not None:
                        with phase("checkpoint", step):
                            saver.wait()
                    raise Interrupted(signum, step, checkpoint)

    def _signal(self, guard: InterruptGuard, step: int) -> int:
        """The signal that any rank got, the same on all: it stops them at the same step; 0: none."""
        with phase("agreement of the ranks at the end", step):
            return largest(guard.received or 0)

    def _step(self, step: int) -> None:
        parts, config = self._parts, self._parts.config
        logs = step % config.log.every == 0 or step in (1, parts.plan.steps)
        every = config.train.eval_every
        evaluates = step == parts.plan.steps or (every > 0 and step % every == 0)
        if logs:
            synchronize(parts.device)
        began = time.perf_counter()
        with phase("forward and backward pass", step):
            loss = self._forward_backward(step)
        with phase("clipping", step):
            norm = self._clip()
        self._finite.note(step, loss, norm)
        rates = learning_rates(parts.optimizer)
        with phase("optimizer step", step), self._finite.deciding(step):
            optimizer_s = self._update(timed=logs)
        step_s = time.perf_counter() - began
        tokens = step * parts.plan.tokens
        parts.state.progress.update(step=step, tokens=tokens)
        self._hooks.advance(step)
        # on a CPU looking at the loss is free, on an accelerator it waits for the step
        if logs or evaluates or parts.device.type == "cpu":
            self._finite.check()
        if not (logs or evaluates):
            return
        record: Record = {"step": step, "tokens": tokens, "seconds": round(self._watch.lap(), 6)}
        if logs:
            record.update(self._log(step, loss, norm))
            record.update(rates)
            record["optim/step_ms"] = optimizer_s * 1e3
            record["optim/pct_of_step"] = 100.0 * optimizer_s / step_s
            record.update(step_stats(parts.optimizer))
            record.update(clip_metrics(parts.qk_clip))
            if self._finite.skipped_steps is not None:
                record["optim/skipped_steps"] = self._finite.skipped_steps
        if evaluates:
            self._watch.stop()
            with phase("validation", step):
                found = self._hooks.validate()
            self._watch.start()
            record[VALIDATION_LOSS] = found.loss
            if found.bits_per_byte is not None:
                record[BITS_PER_BYTE] = found.bits_per_byte
        self._hooks.record(record)

    def _forward_backward(self, step: int) -> Tensor:
        """Accumulate the gradients of a step; returns the loss, of all ranks."""
        parts, passes = self._parts, self._parts.plan.accumulation
        total = torch.zeros((), device=parts.device)
        for number in range(1, passes + 1):
            began = time.perf_counter()
            batch = next(self._batches)
            self._last.loading += time.perf_counter() - began
            input_ids = batch["input_ids"].to(parts.device, non_blocking=True)
            labels = batch["labels"].to(parts.device, non_blocking=True)
            with parts.placed.micro_batch(last=number == passes):
                with autocast(parts.device, parts.dtype):
                    loss = language_model_loss(parts.placed.wrapped, input_ids, labels) / passes
                loss.backward()
            total += loss.detach()
        return average_(total)

    def _clip(self) -> Tensor:
        """Clip the gradients; returns their norm before, of all ranks.

        Gradients of a norm that is not finite stay as they are, as scaling would make all of them NaN.
        """
        parameters = list(self._parts.placed.model.parameters())
        settle_gradients(parameters)
        bound = self._parts.config.optim.grad_clip or math.inf
        return distmuon.clip_grad_norm_(parameters, bound, keep_nonfinite=True)

    def _update(self, *, timed: bool) -> float:
        """Step optimizer and schedule; returns the optimizer's seconds where they were asked for."""
        parts = self._parts
        if timed:
            synchronize(parts.device)
        began = time.perf_counter()
        parts.optimizer.step()
        if timed:
            synchronize(parts.device)
        seconds = time.perf_counter() - began
        parts.optimizer.zero_grad(set_to_none=True)
        parts.scheduler.step()
        return seconds

    def _log(self, step: int, loss: Tensor, norm: Tensor) -> Record:
        parts, last = self._parts, self._last
        seconds, steps = self._watch.seconds - last.seconds, step - last.step
        speed = steps * parts.plan.tokens / seconds / parts.layout.world  # of one device
        record: Record = {
            TRAIN_LOSS: loss.item(),
            "grad_norm": norm.item(),
            "throughput(tps)": speed,
            "time_metrics/end_to_end(s)": seconds / steps,
            "time_metrics/data_loading(s)": last.loading / steps,
        }
        memory = peak_memory_gib(parts.device)
        if memory is not None:
            record["memory/max_reserved(GiB)"] = memory
        if parts.peak_flops is not None:
            record["mfu(%)"] = 100.0 * speed * parts.flops_per_token / parts.peak_flops
        self._last = _Window(step, self._watch.seconds)
        return record


@dataclass
class _Window:
    """Where the present averages began: step, training seconds, and seconds spent loading since."""

    step: int
    seconds: float
    loading: float = 0.0


class _StopWatch:
    """Training time: it stands still during validations and checkpoints."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = time.perf_counter()

    def start(self) -> None:
        self._began = time.perf_counter()

    def lap(self) -> float:
        """Bring ``seconds`` up to date, go on counting."""
        now = time.perf_counter()
        self.seconds += now - self._began
        self._began = now
        return self.seconds

    stop = lap
