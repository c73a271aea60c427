"""Names of machines and the addresses behind them, from a name server that may be silent."""

from __future__ import annotations

import ipaddress
import socket

from distmuon.diagnosing.within import within

# A name server that has not answered by then holds up every start
_SECONDS = 5.0


def addresses(name: str, port: int | None = None) -> list[str]:
    """The addresses of a machine, each once.

    Raises:
        OSError: if there are none, with the reason; ``TimeoutError`` if no name server answers in 5 s.
    """
    found = within(_SECONDS, lambda: socket.getaddrinfo(name, port, type=socket.SOCK_STREAM))
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_own(address: str) -> bool:
    """Whether an address is one of this machine: only then a socket can be bound to it."""
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def is_free(port: int) -> bool:
    """Whether nobody on this machine listens at a port."""
    with socket.socket() as probe:
        # as a store does it, so that connections of an earlier one that linger are no hindrance
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def is_loopback(address: str) -> bool:
    """Whether an address leads back to the machine itself."""
    try:
        return ipaddress.ip_address(address.split("%", 1)[0]).is_loopback
    except ValueError:
        return False


def reason(error: OSError) -> str:
    """Why, in a few words."""
    return (error.strerror or str(error) or type(error).__name__).rstrip(".")


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
