"""Where the ranks of a launch meet: the store that torchrun's agent keeps, or one that rank 0 opens."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

# public names, which torch re-exports without saying so to type checkers
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from distmuon.diagnosing.findings import FAILURE, Finding
from distmuon.diagnosing.names import addresses, is_free, reason
from distmuon.diagnosing.places import Here

# One attempt to connect, and the pause to the next one
_ATTEMPT_S, _PAUSE_S = 3.0, 0.2


class UnmetError(Exception):
    """This rank cannot get to the others.

    Attributes:
        finding: Why.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.found)
        self.finding = finding


def meet(here: Here) -> Store:
    """The store of all ranks, through a prefix of this start of them.

    Raises:
        UnmetError: if it cannot be opened, or reached within the time-out.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if address is None or not port.isdigit():
        raise _unmet(
            f"WORLD_SIZE is {here.size}, and MASTER_ADDR and MASTER_PORT do not say where ranks meet",
            "start with torchrun, or unset WORLD_SIZE to check this machine alone",
        )
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    opens = here.rank == 0 and not kept
    if opens and not is_free(int(port)):
        raise _unmet(
            f"port {port} of {here.hostname} is taken",
            "end what listens there (ss -ltnp), or choose another --master-port",
        )
    if not opens:
        _reach(address, int(port), here.timeout_s)
    try:
        store = TCPStore(
            address, int(port), is_master=opens, wait_for_workers=False, timeout=timedelta(seconds=here.timeout_s)
        )
    except RuntimeError as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise _unmet(
            f"the store at {address} port {port} cannot be used ({told})", "choose another --master-port"
        ) from error
    start = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return PrefixStore(f"distmuon/doctor/{start}", store)


def _reach(address: str, port: int, seconds: float) -> None:
    """Wait until somebody listens at a port.

    Raises:
        UnmetError: if its name has no address, or nobody does within so many seconds.
    """
    try:
        addresses(address)
    except OSError as error:
        raise _unmet(
            f"MASTER_ADDR {address} has no address here ({reason(error)})",
            "give torchrun an IP address of rank 0's machine as --master-addr, or add the name to /etc/hosts",
        ) from error
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), _ATTEMPT_S):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _unmet(
                    f"nobody answers at {address} port {port} within {seconds:g} s ({reason(error)})",
                    "look whether rank 0 runs, whether that is its machine, and at the firewall of that port",
                ) from error
        time.sleep(_PAUSE_S)


def _unmet(found: str, todo: str) -> UnmetError:
    return UnmetError(Finding("meeting", FAILURE, found, todo))
