"""The faults of the soak test: a list of what can happen, and a plan drawn from it by a seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

from fault_runs import Fault

LOST, AGAIN, ERROR = 69, 75, 1
KILLED = -9


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kind of fault, and what is to come of it.

    Attributes:
        kind: A name of `fault_runs.KINDS`, or of what `damage` does.
        victim: Exit code of the rank that it happens to.
        others: Exit code of the other ranks.
        said: A part of what rank 0 says, or the lowest other rank if it happens to rank 0; None: nothing.
        damage: Done to the newest checkpoint before the ranks are started again, which then go on from an older one;
            it is followed by one of the other faults.
        flags: Of the command, beside those of all.
        seconds: How long a stall is.
    """

    kind: str
    victim: int = KILLED
    others: int = LOST
    said: str = "another rank has probably ended or stalled"
    damage: Callable[[Path], None] | None = None
    flags: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Planned:
    """One start of the ranks.

    Attributes:
        entry: What happens in it.
        fault: The same, with rank and step.
        damage: What happens to the newest checkpoint before; None: nothing.
    """

    entry: Entry
    fault: Fault
    damage: Entry | None = None


def _data_file(checkpoint: Path) -> Path:
    """The largest file: that of the tensors of a rank."""
    return max(checkpoint.glob("*.distcp"), key=lambda path: (path.stat().st_size, path.name))


def truncate(checkpoint: Path) -> None:
    file = _data_file(checkpoint)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(checkpoint: Path) -> None:
    file = _data_file(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


TIMEOUT_S, STALL_S = 8.0, 12.0

FAULTS = (
    Entry("killed in the backward pass"),
    Entry("killed in the gather of matrices"),
    Entry("killed in Newton-Schulz"),
    Entry("killed in a checkpoint write"),
    Entry(
        "stalled in the forward pass",
        victim=LOST,
        flags=(f"--parallel.timeout_seconds={TIMEOUT_S}",),
        seconds=STALL_S,
    ),
    Entry("NaN in a gradient", victim=ERROR, others=ERROR, said="NaN or an infinity in the gradient of"),
    Entry(
        "bit flipped on the wire",
        victim=ERROR,
        others=ERROR,
        said="arrived changed, by the checksums of verify_exchange",
        flags=("--optim.verify_exchange=true",),
    ),
    Entry("SIGTERM in a step", victim=AGAIN, others=AGAIN, said="stopped by SIGTERM after step"),
    Entry("SIGUSR1 in a step", victim=AGAIN, others=AGAIN, said="stopped by SIGUSR1 after step"),
    Entry("disk full in a checkpoint write", victim=ERROR, others=ERROR, said="could not be written"),
    Entry("newest checkpoint truncated", damage=truncate),
    Entry("newest checkpoint with a bit flipped", damage=flip_a_bit),
)


def draw(seed: int, count: int, world: int, steps: int) -> list[Planned]:
    """A plan of `count` faults, each kind at least once, at steps that ascend.

    A damaged checkpoint counts as a fault, and comes together with the one that ends the start after it.
    """
    dice = random.Random(seed)
    kinds = [*FAULTS, *dice.choices(FAULTS, k=count - len(FAULTS))]
    damages = [entry for entry in kinds if entry.damage is not None]
    inside = [entry for entry in kinds if entry.damage is None]
    dice.shuffle(inside)
    # the first start saves, whatever its step: without a checkpoint there is nothing to go on from
    saving = next(entry for entry in inside if entry.others == AGAIN)
    inside.remove(saving)
    inside.insert(0, saving)
    # not before the first starts, when there may be no older checkpoint to go on from
    damaged = dict(zip(sorted(dice.sample(range(4, len(inside)), len(damages))), damages, strict=True))
    width = steps // (len(inside) + 1)
    planned = []
    for number, entry in enumerate(inside):
        step = 1 + number * width + dice.randrange(width)
        fault = Fault(entry.kind, dice.randrange(world), step, seconds=entry.seconds)
        planned.append(Planned(entry, fault, damaged.get(number)))
    return planned
