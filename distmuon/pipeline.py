"""What overlaps what: while one wave of buckets is orthogonalized, the next ones arrive and the last ones go home."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmuon.applying import apply_parts
from distmuon.blending import blend_wave
from distmuon.comm.buffers import BufferPool
from distmuon.comm.exchange import Exchange, Transfer
from distmuon.flight import Flight, LocalParameter, in_words, packed
from distmuon.groups import Group
from distmuon.numerics.costs import CostTable
from distmuon.numerics.rows import Team
from distmuon.options import Options
from distmuon.orthogonalizing import orthogonalize_wave
from distmuon.plan.plan import Plan
from distmuon.plan.routes import Leg, Part, Routes, route
from distmuon.plan.schedule import Schedule, schedule
from distmuon.plan.waves import Wave
from distmuon.staging import Arrival, Staging
from distmuon.stats import StepClock


@dataclass
class Pipeline:
    """Runs the waves of one plan on one rank.

    How many of them are under way at a time is said by the plan's schedule.

    Attributes:
        plan: What to do.
        rank: This process, a global rank.
        exchange: Moves packed buffers.
        device: Where matrices are gathered and multiplied.
        options: The settings of the optimizer.
        table: Speed of the engines, the same on all ranks.
        all_gather: Whether updates of replicated buckets come back by all-gather.
        clock: Times the phases.
        teams: Those that this rank is in, by size.
        pool: Lends the buffers.
        staging: Copies between ``device`` and the host; None: no parameter is offloaded to it.
        bytes_sent: Bytes that left this rank in the last step, padding of an all-gather included.
        owner_gradients: Whether a matrix of one owner has its gradient there alone, so that momentum is kept
            there alone too.
        in_blocks: Groups whose matrices are blocks of those of whole steps, by index: they have a rate of their own.
    """

    plan: Plan
    rank: int
    exchange: Exchange
    device: torch.device
    options: Options
    table: CostTable
    all_gather: bool
    clock: StepClock
    teams: Mapping[int, Team] = field(default_factory=dict)
    pool: BufferPool = field(default_factory=BufferPool)
    staging: Staging | None = None
    bytes_sent: int = 0
    owner_gradients: bool = False
    in_blocks: frozenset[int] = frozenset()
    _routes: dict[tuple[int, tuple[bool, ...]], Routes] = field(default_factory=dict)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """When waves set out, the same on every rank."""
        return schedule(self.plan)

    def buffer_bytes(self) -> int:
        """Most bytes of buffers at once on this rank: of waves that arrive, are computed, or leave."""
        arriving, computed, leaving = [], [], []
        for number, wave in enumerate(self.plan.waves):
            routes = self._route(number, wave, (True,) * len(self.plan.parameters))
            kept = sum(part.box.numel for part in routes.kept)
            arriving.append(routes.gather.send_numel + routes.gather.receive_numel + kept)
            computed.append(routes.owned_numel)
            legs = [leg.send_numel + leg.receive_numel for leg in routes.scatters]
            # while one leg is on its way the one before is applied, and the matrices wait for the last one
            pairs = max(map(sum, itertools.pairwise(legs)), default=legs[0])
            # offloaded updates that are at home already are copied to the host from a buffer of their own
            lowered = 0 if self.staging is None else sum(part.box.numel for part in routes.updated)
            leaving.append(pairs + lowered + (routes.owned_numel if len(legs) > 1 else 0))
        most = 0
        for number, own in enumerate(computed):
            begun, settled = self.schedule.begun[number], self.schedule.settled[number]
            # of this wave what arrives is unpacked before others are sent, and its update leaves after others settle
            ahead = arriving[number] + own + sum(leaving[self._settled_before(number) : number])
            computing = own + sum(arriving[number + 1 : begun]) + sum(leaving[self._settled_before(number) : number])
            sent = own + sum(arriving[number + 1 : begun]) + sum(leaving[settled : number + 1])
            most = max(most, ahead, computing, sent)
        return most * self._dtype.itemsize

    def _settled_before(self, number: int) -> int:
        """Waves whose updates have been applied when it is a wave's turn."""
        return self.schedule.settled[number - 1] if number else 0

    def run(self, groups: Sequence[Group], local: Mapping[int, LocalParameter], active: Sequence[bool]) -> None:
        """Update the parameters of the plan in place.

        Args:
            groups: All parameter groups of the optimizer: the hyperparameters.
            local: What this rank stores, by place in the plan; only those that take part are looked at.
            active: Whether each parameter of the plan takes part, the same on every rank.

        Raises:
            RuntimeError: if an exchange fails, as when another rank died; names the bucket.
        """
        chosen = tuple(active)
        steps = [
            number
            for number, wave in enumerate(self.plan.waves)
            if any(chosen[assignment.parameter] for assignment in wave.assignments)
        ]
        self.bytes_sent = 0
        waiting = deque(steps)
        arriving: deque[Flight] = deque()
        leaving: deque[tuple[int, Flight]] = deque()

        def begin(end: int) -> None:
            while waiting and waiting[0] < end:
                number = waiting.popleft()
                arriving.append(self._gather(number, groups, local, chosen))

        def settle(end: int) -> None:
            while leaving and leaving[0][0] < end:
                self._apply_received(leaving.popleft()[1], groups, local)

        try:
            for number in steps:
                begin(number + 1)
                current = arriving.popleft()
                self._unpack(current)
                begin(self.schedule.begun[number])
                orthogonalize_wave(
                    current,
                    groups,
                    rank=self.rank,
                    device=self.device,
                    options=self.options,
                    table=self.table,
                    teams=self.teams,
                    clock=self.clock,
                )
                settle(self.schedule.settled[number])
                self._scatter(current, groups, local)
                leaving.append((number, current))
            settle(len(self.plan.waves))
        except BaseException:
            self.pool.clear()
            if self.staging is not None:
                self.staging.clear()
            raise

    def _gather(
        self,
        number: int,
        groups: Sequence[Group],
        local: Mapping[int, LocalParameter],
        active: tuple[bool, ...],
    ) -> Flight:
        """Blend momentum where it lives, and send the result to the owners."""
        wave = self.plan.waves[number]
        routes = self._route(number, wave, active)
        leg, dtype = routes.gather, self._dtype
        send = self.pool.take(leg.send_numel, dtype, self.device)
        receive = self.pool.take(leg.receive_numel, dtype, self.device)
        kept_numel = sum(part.box.numel for part in routes.kept)
        kept = self.pool.take(kept_numel, dtype, self.device)
        flight = Flight(self.plan, wave, routes, kept, Transfer(send, receive))
        # with nothing to wait for, what is kept is blended straight into the matrices
        whole = leg.receive_numel == 0
        if whole:
            flight.matrices = kept
        staging = self._staging_of(flight, local)
        if staging is not None:
            self._blend_on_host(staging, flight, groups, local, whole=whole)
        else:
            with self.clock.phase("pack", self.device):
                self._blend(flight, groups, local, whole=whole)
        if wave.gathers:
            with staging.up.inside() if staging is not None else contextlib.nullcontext():
                flight.gather = self._start(leg, send, receive)
        return flight

    def _staging_of(self, flight: Flight, local: Mapping[int, LocalParameter]) -> Staging | None:
        """How a wave is copied between host and device; None if any of it is stored on the device."""
        numbers = {flight.wave.assignments[part.slot].parameter for part in flight.routes.held}
        if self.staging is not None and all(local[number].param.device.type == "cpu" for number in numbers):
            flight.staging = self.staging
        return flight.staging

    def _blend_on_host(
        self,
        staging: Staging,
        flight: Flight,
        groups: Sequence[Group],
        local: Mapping[int, LocalParameter],
        *,
        whole: bool,
    ) -> None:
        """Blend into buffers of the host, and begin to copy these to those of the device."""
        send, kept, matrices = flight.gather.send, flight.kept, flight.matrices
        flight.gather.send = staging.take(send.numel(), send.dtype)
        flight.kept = staging.take(kept.numel(), kept.dtype)
        flight.matrices = flight.kept if whole else None
        with self.clock.phase("pack"):
            self._blend(flight, groups, local, whole=whole)
        flight.lifted = staging.lift([(flight.gather.send, send), (flight.kept, kept)])
        flight.gather.send, flight.kept, flight.matrices = send, kept, matrices

    def _blend(
        self, flight: Flight, groups: Sequence[Group], local: Mapping[int, LocalParameter], *, whole: bool
    ) -> None:
        owners = self.plan.sole_owners if self.owner_gradients else {}
        elsewhere = {number for number, owner in owners.items() if owner != self.rank}
        blend_wave(flight, groups, local, whole=whole, elsewhere=elsewhere, foreach=self._foreach(flight))

    def _unpack(self, flight: Flight) -> None:
        """Put whole matrices together from what arrived and what was here."""
        routes, gather = flight.routes, flight.gather
        self._wait(gather, flight.wave, "gather")
        if flight.lifted is not None:
            flight.lifted.join()
        self.pool.give(gather.send)
        if flight.matrices is None:
            with self.clock.phase("unpack", self.device):
                flight.matrices = self.pool.take(routes.owned_numel, self._dtype, self.device)
                for part in routes.gather.receives:
                    flight.view(part).copy_(packed(gather.receive, part))
                for part in routes.kept:
                    flight.view(part).copy_(packed(flight.kept, part))
            self.pool.give(flight.kept)
        self.pool.give(gather.receive)

    def _scatter(self, flight: Flight, groups: Sequence[Group], local: Mapping[int, LocalParameter]) -> None:
        """Send updates home, the first leg of them, and meanwhile apply those that are at home already."""
        routes = flight.routes
        if flight.wave.scatters:
            flight.legs.extend(routes.scatters)
            flight.scatter = self._send(flight)
        if flight.staging is not None:
            flight.home = self._lower_own(flight.staging, flight)
        else:
            with self.clock.phase("apply", self.device):
                directions = [flight.view(part) for part in routes.updated]
                self._apply(flight, routes.updated, directions, groups, local)
        self._release(flight)

    def _lower_own(self, staging: Staging, flight: Flight) -> Arrival:
        """Begin to copy to the host, in one piece, the updates that are at home already."""
        parts = flight.routes.updated
        together = self.pool.take(sum(part.box.numel for part in parts), self._dtype, self.device)
        places = together.split([part.box.numel for part in parts])
        for place, part in zip(places, parts, strict=True):
            place.view(part.box.sizes).copy_(flight.view(part))
        return staging.lower(together)

    def _send(self, flight: Flight) -> tuple[Leg, Transfer] | None:
        """Start the next leg of the updates, if there is one."""
        if not flight.legs:
            return None
        leg = flight.legs.popleft()
        send = self.pool.take(leg.send_numel, self._dtype, self.device)
        receive = self.pool.take(leg.receive_numel, self._dtype, self.device)
        with self.clock.phase("pack", self.device):
            for part in leg.sends:
                packed(send, part).copy_(flight.view(part))
        return leg, self._start(leg, send, receive)

    def _release(self, flight: Flight) -> None:
        """Give back the matrices once all of them were sent."""
        if flight.matrices is not None and not flight.legs:
            self.pool.give(flight.matrices)
            flight.matrices = None

    def _apply_received(self, flight: Flight, groups: Sequence[Group], local: Mapping[int, LocalParameter]) -> None:
        """Wait for all legs of the updates and apply what they bring, one while the next is on its way."""
        self._apply_lowered(flight, groups, local)
        while flight.scatter is not None:
            following = self._send(flight)
            self._release(flight)
            leg, transfer = flight.scatter
            receives = [part for part in leg.receives if part.box.numel]
            if flight.staging is None:
                self._wait(transfer, flight.wave, "update")
                with self.clock.phase("apply", self.device):
                    directions = [packed(transfer.receive, part) for part in receives]
                    self._apply(flight, receives, directions, groups, local)
            else:
                with flight.staging.down.inside():
                    self._wait(transfer, flight.wave, "update")
                    arrival = flight.staging.lower(transfer.receive)
                with self.clock.phase("apply"):
                    host = arrival.wait()
                    self._apply(flight, receives, [packed(host, part) for part in receives], groups, local)
                flight.staging.give(host)
            self.pool.give(transfer.send)
            self.pool.give(transfer.receive)
            flight.scatter = following

    def _apply_lowered(self, flight: Flight, groups: Sequence[Group], local: Mapping[int, LocalParameter]) -> None:
        """Apply on the host the updates of matrices that this rank owns, where they were copied there."""
        if flight.staging is None or flight.home is None:
            return
        parts, home = flight.routes.updated, flight.home
        with self.clock.phase("apply"):
            host = home.wait()
            places = host.split([part.box.numel for part in parts])
            directions = [place.view(part.box.sizes) for place, part in zip(places, parts, strict=True)]
            self._apply(flight, parts, directions, groups, local)
        flight.staging.give(host)
        self.pool.give(home.sent)
        flight.home = None

    def _apply(
        self,
        flight: Flight,
        parts: Sequence[Part],
        directions: Sequence[Tensor],
        groups: Sequence[Group],
        local: Mapping[int, LocalParameter],
    ) -> None:
        foreach, exact = self._foreach(flight), not self.options.batched
        ratios = {index: float(groups[index]["block_lr_ratio"]) for index in self.in_blocks}
        apply_parts(flight, parts, directions, groups, local, ratios=ratios, foreach=foreach, exact=exact)

    def _start(self, leg: Leg, send: Tensor, receive: Tensor) -> Transfer:
        copies = 1 if leg.gathered is None else len(self.plan.ranks) - 1
        self.bytes_sent += send.nbytes * copies
        with self.clock.phase("wire", self.device):
            return self.exchange.start(leg, send, receive)

    def _wait(self, transfer: Transfer, wave: Wave, direction: str) -> None:
        with self.clock.phase("wait", self.device):
            # said of this step, and without a reference to the pipeline: it may be asked long after
            transfer.wait(functools.partial(in_words, self.plan, wave, direction, self._dtype, self.clock.steps))

    def _route(self, number: int, wave: Wave, active: tuple[bool, ...]) -> Routes:
        chosen = tuple(active[assignment.parameter] for assignment in wave.assignments)
        key = (number, chosen)
        if key not in self._routes:
            # masks of experts that are used now and then are many; one of a kind need not stay
            if len(self._routes) > 4 * len(self.plan.waves):
                self._routes.clear()
            self._routes[key] = route(self.plan, wave, self.rank, active=active, all_gather=self.all_gather)
        return self._routes[key]

    @property
    def _dtype(self) -> torch.dtype:
        return self.options.wire_dtype

    def _foreach(self, flight: Flight) -> bool:
        # on a CPU foreach functions loop over the tensors themselves
        return self.options.batched and self.device.type != "cpu" and flight.staging is None
