"""What a step takes before it is run: the pipeline of :mod:`distmuon.pipeline`, simulated on plain data.

Every rank has one engine, which packs, orthogonalizes and applies in the order of the pipeline, and one link in each
direction to its node and one to other nodes. Bytes queue on a link in the order in which exchanges begin. The price of
an orthogonalization is in the plan; the rest is in :class:`distmuon.speeds.Speeds`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from distmuon.plan.plan import Plan
from distmuon.plan.schedule import Schedule
from distmuon.plan.schedule import schedule as schedule_of
from distmuon.plan.simulate_loads import LegLoad, WaveLoad, loads
from distmuon.plan.simulate_parts import Cores, Exchange, Lanes
from distmuon.plan.simulate_timeline import GLOO as GLOO
from distmuon.plan.simulate_timeline import NCCL as NCCL
from distmuon.plan.simulate_timeline import Span as Span
from distmuon.plan.simulate_timeline import Timeline as Timeline
from distmuon.plan.simulate_timeline import Traffic as Traffic
from distmuon.plan.simulate_timeline import Transport as Transport
from distmuon.speeds import Speeds


def simulate(
    plan: Plan,
    speeds: Speeds,
    *,
    itemsize: int,
    schedule: Schedule | None = None,
    spans: bool | Collection[int] = False,
    ranks_per_core: float = 1.0,
    startup: float = 0.0,
    transport: Transport = NCCL,
) -> Timeline:
    """Predict the step of a plan whose costs are nanoseconds.

    A pure function of its arguments.

    Args:
        plan: What to do.
        speeds: Of links and memory.
        itemsize: Bytes of an element on the wire.
        schedule: When buckets set out; None: that of the plan.
        spans: Whether to note what each rank does when, or of which ranks.
        ranks_per_core: More than 1: so many ranks share each core, those of them that compute at a time equally.
        startup: Seconds before the first bucket.
        transport: How collectives are run.

    Raises:
        ValueError: for fewer than one byte an element or rank a core, a schedule of another plan, or negative seconds.
    """
    order = schedule_of(plan) if schedule is None else schedule
    count = len(plan.waves)
    if not len(order.begun) == len(order.settled) == count:
        raise ValueError(f"schedule is for {len(order.begun)} waves, the plan has {count}: make it of this plan.")
    if itemsize < 1:
        raise ValueError(f"itemsize={itemsize}: an element takes at least one byte.")
    if ranks_per_core < 1.0:
        raise ValueError(f"ranks_per_core={ranks_per_core}: a rank computes on one core, so it is at least 1.")
    if not 0.0 <= startup < float("inf"):
        raise ValueError(f"startup={startup}: seconds are finite and not negative.")
    wanted = set(plan.ranks if spans is True else () if spans is False else spans)
    run = _Run(plan, speeds, itemsize, order, wanted, ranks_per_core, startup, transport)
    run.run()
    return run.timeline()


@dataclass(frozen=True, slots=True)
class _Compute:
    """A pass of the engine: by rank its seconds."""

    kind: str
    bucket: int
    seconds: Sequence[float]


@dataclass(frozen=True, slots=True)
class _Start:
    exchange: Exchange


@dataclass(frozen=True, slots=True)
class _Wait:
    exchange: Exchange


@dataclass(slots=True)
class _Meet:
    """Teams come together: by rank its team, and by team how many have yet to come."""

    bucket: int
    team: Sequence[tuple[int, ...] | None]
    missing: dict[tuple[int, ...], int]


class _Run:
    """The state of a simulation; ranks are meant by their place in the plan."""

    def __init__(
        self,
        plan: Plan,
        speeds: Speeds,
        itemsize: int,
        order: Schedule,
        wanted: set[int],
        ranks_per_core: float,
        startup: float,
        transport: Transport,
    ) -> None:
        ranks = len(plan.ranks)
        self._plan, self._itemsize, self._transport = plan, itemsize, transport
        self._links = tuple(Lanes(link, ranks, transport.duty) for link in (speeds.local, speeds.remote))
        self._wanted = [rank in wanted for rank in plan.ranks]
        self._spans: list[Span] = []
        self._exchanges: list[Exchange] = []
        waves = list(loads(plan, all_gather=transport.all_gather))
        self._program = self._operations(waves, speeds, order)
        self._next = [0] * ranks
        self._time = [startup] * ranks
        self._blocked: list[Exchange | None] = [None] * ranks
        self._ns = [0.0] * ranks
        self._idle = [0.0] * ranks
        self._debt = [0.0] * ranks
        self._computing: dict[int, _Compute] = {}
        self._ready = deque(range(ranks))
        self._cores = Cores(ranks / ranks_per_core, startup) if ranks_per_core > 1.0 else None

    def _operations(
        self, waves: Sequence[WaveLoad], speeds: Speeds, order: Schedule
    ) -> list[_Compute | _Start | _Wait | _Meet]:
        """What every rank does, one after another; they differ in how long it takes them."""
        program: list[_Compute | _Start | _Wait | _Meet] = []
        gathers: dict[int, Exchange] = {}
        scatters: dict[int, Exchange] = {}
        ranks = len(self._plan.ranks)
        # exchanges are named by the first bucket of their wave
        first = [load.work[0].bucket for load in waves]

        def compute(kind: str, bucket: int, factor: float, amounts: Sequence[float]) -> None:
            if factor and any(amounts):
                program.append(_Compute(kind, bucket, [factor * amount for amount in amounts]))

        def start(kind: str, number: int, leg: LegLoad) -> Exchange:
            exchange = Exchange(
                len(self._exchanges), kind, first[number], leg, self._itemsize, self._links, joint=self._transport.joint
            )
            self._exchanges.append(exchange)
            program.append(_Start(exchange))
            return exchange

        begun = 0

        def begin(until: int) -> None:
            nonlocal begun
            for number in range(begun, min(until, len(waves))):
                compute("pack", first[number], speeds.blend, waves[number].held)
                if waves[number].gather.moves:
                    gathers[number] = start("gather", number, waves[number].gather)
            begun = max(begun, until)

        def send(number: int, part: int) -> Exchange:
            """Pack a leg of the updates, and start it."""
            load = waves[number]
            leg = load.scatter.cut(part, load.legs)
            owned = [numel / load.legs for numel in load.owned]
            sent = owned if leg.gathered is not None else [a + b for a, b in zip(*leg.sent, strict=True)]
            compute("pack", first[number], speeds.copy, sent)
            return start("scatter", number, leg)

        def receive(number: int) -> None:
            """Wait for all legs and apply them, one while the next is on its way."""
            load = waves[number]
            received = [(held - kept) / load.legs for held, kept in zip(load.held, load.kept, strict=True)]
            under_way = scatters.pop(number)
            for part in range(load.legs):
                following = send(number, part + 1) if part + 1 < load.legs else None
                program.append(_Wait(under_way))
                compute("apply", first[number], speeds.apply, received)
                under_way = following or under_way

        settled = 0

        def settle(until: int) -> None:
            nonlocal settled
            for number in range(settled, until):
                if number in scatters:
                    receive(number)
            settled = max(settled, until)

        for number, load in enumerate(waves):
            begin(number + 1)
            if number in gathers:
                program.append(_Wait(gathers[number]))
                # a rank to which nothing came has blended straight into its matrices
                came = [near + far for near, far in zip(*load.gather.received, strict=True)]
                unpacked = [n if c else 0 for n, c in zip(load.owned, came, strict=True)]
                compute("pack", first[number], speeds.copy, unpacked)
            begin(order.begun[number])
            for work in load.work:
                if work.teams:
                    program.append(_meeting(work.bucket, work.teams, ranks))
                compute("ns", work.bucket, 1e-9, work.cost)
            settle(min(order.settled[number], number))
            if load.scatter.moves:
                scatters[number] = send(number, 0)
            compute("apply", first[number], speeds.apply, load.kept)
        settle(len(waves))
        return program

    def run(self) -> None:
        """Let every rank go on until it waits, until all are done."""
        while True:
            while self._ready:
                self._go_on(self._ready.popleft())
            if self._cores is None or not self._cores.busy:
                break
            place, now = self._cores.advance()
            operation = self._computing.pop(place, None)
            if operation is not None:
                self._ran(place, operation, now)
            self._ready.append(place)
        assert all(number == len(self._program) for number in self._next), "a rank waits for ever"

    def timeline(self) -> Timeline:
        """What was found."""
        ranks = self._plan.ranks
        spans = [
            Span(rank, exchange.kind, exchange.bucket, exchange.begun[place], exchange.done[place])
            for exchange in self._exchanges
            for place, rank in enumerate(ranks)
            if self._wanted[place] and exchange.open[place] == 0 and exchange.done[place] > exchange.begun[place]
        ]
        totals = [[0] * len(ranks) for _ in range(4)]
        for exchange in self._exchanges:
            for total, amounts in zip(totals, (*exchange.sent, *exchange.received), strict=True):
                for place, amount in enumerate(amounts):
                    total[place] += amount
        local_out, remote_out, local_in, remote_in = totals
        traffic = map(Traffic, local_out, local_in, remote_out, remote_in)
        return Timeline(
            ranks=ranks,
            seconds=max(self._time),
            finish=dict(zip(ranks, self._time, strict=True)),
            ns=dict(zip(ranks, self._ns, strict=True)),
            waiting=dict(zip(ranks, self._idle, strict=True)),
            bytes=dict(zip(ranks, traffic, strict=True)),
            spans=tuple(sorted([*self._spans, *spans], key=lambda span: (span.rank, span.start, span.end))),
        )

    def _go_on(self, place: int) -> None:
        program = self._program
        while self._next[place] < len(program):
            operation = program[self._next[place]]
            if isinstance(operation, _Compute):
                self._next[place] += 1
                if operation.seconds[place] and self._compute(place, operation):
                    return
            elif isinstance(operation, _Start):
                self._next[place] += 1
                operation.exchange.called[place] = self._time[place]
                self._begin(operation.exchange, place)
            elif isinstance(operation, _Wait):
                if operation.exchange.open[place]:
                    self._blocked[place] = operation.exchange
                    return
                self._next[place] += 1
                if self._idle_until(place, operation.exchange.done[place], operation.exchange.bucket):
                    return
            elif not self._meet(operation, place):
                return

    def _compute(self, place: int, operation: _Compute) -> bool:
        """Run a pass; whether its end is known only later."""
        seconds = operation.seconds[place]
        # threads that move bytes get as much of a core as the engine while both want it
        stolen = min(self._debt[place], seconds)
        self._debt[place] -= stolen
        if self._cores is None:
            self._ran(place, operation, self._time[place] + seconds + stolen)
            return False
        self._computing[place] = operation
        self._cores.work(place, seconds + stolen)
        return True

    def _ran(self, place: int, operation: _Compute, end: float) -> None:
        start = self._time[place]
        if operation.kind == "ns":
            self._ns[place] += end - start
        if self._wanted[place]:
            self._spans.append(Span(self._plan.ranks[place], operation.kind, operation.bucket, start, end))
        self._time[place] = end

    def _idle_until(self, place: int, end: float, bucket: int) -> bool:
        """Do nothing; whether others have to be let run meanwhile."""
        start = self._time[place]
        if end <= start:
            return False
        self._idle[place] += end - start
        self._debt[place] = max(0.0, self._debt[place] - (end - start))
        if self._wanted[place]:
            self._spans.append(Span(self._plan.ranks[place], "wait", bucket, start, end))
        self._time[place] = end
        if self._cores is None:
            return False
        self._cores.sleep(place, end)
        return True

    def _meet(self, meeting: _Meet, place: int) -> bool:
        """Come to where a team meets; whether it is complete."""
        self._next[place] += 1
        team = meeting.team[place]
        if team is None:
            return True
        meeting.missing[team] -= 1
        if meeting.missing[team]:
            return False
        last = max(self._time[member] for member in team)
        for member in team:
            if not self._idle_until(member, last, meeting.bucket) and member != place:
                self._ready.append(member)
        return self._cores is None or self._time[place] <= self._cores.now

    def _begin(self, exchange: Exchange, place: int) -> None:
        """Let a rank begin an exchange that it has called for, as soon as earlier ones make room, and what follows."""
        todo = deque([(exchange, place)])
        lanes = self._transport.at_once
        while todo:
            exchange, place = todo.popleft()
            number = exchange.number
            if place in exchange.started or place not in exchange.called:
                continue
            start = exchange.called[place]
            if number:
                before = self._exchanges[number - 1]
                if place not in before.started:
                    continue
                start = max(start, before.begun[place])
            if number >= lanes:
                before = self._exchanges[number - lanes]
                if before.open[place]:
                    continue
                start = max(start, before.done[place])
            self._debt[place] += self._transport.handling * exchange.bytes_of(place)
            done = exchange.begin(place, start)
            for member in done:
                if self._blocked[member] is exchange:
                    self._blocked[member] = None
                    self._ready.append(member)
            following = [(member, number + lanes) for member in done] + [(place, number + 1)]
            todo.extend((self._exchanges[later], member) for member, later in following if later < len(self._exchanges))


def _meeting(bucket: int, teams: Sequence[tuple[int, ...]], ranks: int) -> _Meet:
    team: list[tuple[int, ...] | None] = [None] * ranks
    for members in teams:
        for member in members:
            team[member] = members
    return _Meet(bucket, team, {members: len(members) for members in teams})
