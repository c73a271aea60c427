"""Where the processes of a run meet under torchrun: a part of its store that no earlier start of them has used."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

# public names, which torch re-exports without saying so to type checkers
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from distmuon.pretrain.errors import RankLost

_POLL_S = 0.01
# As torch waits for processes by default. Machines may need minutes more than others to read their packages, so
# parallel.timeout_seconds is not meant here; and a process that fails in that time is seen by torchrun.
_PATIENCE = timedelta(minutes=30)


def launcher_store() -> Store | None:
    """The store that torchrun's agent keeps, seen through a prefix that only this start of the processes knows.

    The agent keeps one store over restarts, and torch puts the addresses of the processes into it under the same names
    each time: a process that comes early would read the addresses of those that ended, and find nobody there.

    Returns:
        The store, empty; None where the agent keeps none, as without torchrun.

    Raises:
        RankLost: If some processes do not come within half an hour.
        DistStoreError: If the first one does not.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=_PATIENCE)
    name = welcome(store, world, _PATIENCE) if rank == 0 else arrive(store, rank)
    return PrefixStore(f"distmuon/{name}", store)


def arrive(store: Store, rank: int) -> str:
    """Say to rank 0 that a rank is there, by a word that was never said before; returns the name of this start."""
    own = uuid.uuid4().hex
    store.set(f"distmuon/hello/{rank}", own)
    name = store.get(f"distmuon/welcome/{own}").decode()
    store.set(f"distmuon/{name}/here/{rank}", "")
    return name


def welcome(store: Store, world: int, timeout: timedelta) -> str:
    """Rank 0's part: answer all others until each has confirmed the answer; returns the name of this start.

    A word that a rank of an earlier start has left is answered too, which nobody hears.
    """
    name, missing = uuid.uuid4().hex, list(range(1, world))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in missing:
            if store.check([f"distmuon/hello/{rank}"]):
                store.set(f"distmuon/welcome/{store.get(f'distmuon/hello/{rank}').decode()}", name)
        missing = [rank for rank in missing if not store.check([f"distmuon/{name}/here/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise RankLost(
                f"rank 0: {len(missing)} of the {world} processes of this run did not come within "
                f"{timeout.total_seconds():g} s, rank {missing[0]} among them: see what they said, and start all again."
            )
        if missing:
            time.sleep(_POLL_S)
    return name
