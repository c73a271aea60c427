"""Say how this machine reaches another: ``python _network.py HOST PORT``.

Prints three words: 1 if the host is this machine and 0 if not, the address of this machine on the way to the host, and
the name of its network interface; ``-`` for the last two where it is the loopback, which other machines cannot reach,
or unknown.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys


def main(host: str, port: int) -> str:
    """The three words."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # chooses the way and sends nothing
        probe.connect(target)
        address = str(probe.getsockname()[0])
    if ipaddress.ip_address(address).is_loopback:
        return f"{int(_is_here(family, target))} - -"
    return f"{int(_is_here(family, target))} {address} {_interface(address) or '-'}"


def _is_here(family: int, target: tuple[object, ...]) -> bool:
    """Whether an address is one of this machine's: only those can be bound."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((target[0], 0, *target[2:]))
        except OSError:
            return False
    return True


def _interface(address: str) -> str | None:
    """The interface of an IPv4 address, where Linux tells it."""
    try:
        import fcntl

        wanted = socket.inet_aton(address)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                try:
                    # SIOCGIFADDR
                    found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))[20:24]
                except OSError:
                    continue
                if found == wanted:
                    return name
    except (ImportError, OSError):
        pass
    return None


if __name__ == "__main__":
    try:
        print(main(sys.argv[1], int(sys.argv[2])))
    except OSError as error:
        found = f"HEAD is {sys.argv[1]}, which this machine does not find ({error})"
        sys.exit(f"error: {found}: give a name or address that all machines know.")
