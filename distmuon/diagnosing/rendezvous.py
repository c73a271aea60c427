"""Do names lead to machines? Where ranks meet, and what each machine is called."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping

from distmuon.diagnosing.findings import FAILURE, WARNING, Facts, Finding, Problem, by_value, conclude, some
from distmuon.diagnosing.names import addresses, is_free, is_loopback, is_own, reason
from distmuon.diagnosing.places import Here, Places

# For a connection to a port of another machine that is up
_SECONDS = 3.0


def look(here: Here) -> Facts:
    """Where ranks meet, and this machine's name.

    Returns:
        ``hostname``, ``own`` (its addresses), ``own_error``; where MASTER_ADDR is set ``address``, ``port``,
        ``addresses``, ``error``, ``head`` (whether it is this machine), and before a launch ``taken`` (the port of the
        head) or ``unreachable`` (why the head of others does not answer).
    """
    facts: Facts = {"hostname": here.hostname, "own": [], "own_error": None, "gloo": _named()}
    try:
        facts["own"] = addresses(here.hostname)
    except OSError as error:
        facts["own_error"] = reason(error)
    if not here.launched and here.size > 1:  # processes of one machine, that need no address
        return facts
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    facts |= {"address": address, "port": port, "addresses": [], "error": None, "head": False}
    if address is None:
        return facts
    try:
        facts["addresses"] = addresses(address)
    except OSError as error:
        return {**facts, "error": reason(error)}
    facts["head"] = any(map(is_own, facts["addresses"]))
    return facts if here.launched else {**facts, **_before(address, port, facts["head"])}


def _before(address: str, port: str, head: bool) -> Facts:
    """What can be told of the port before anybody listens there."""
    if not port.isdigit():
        return {}
    if head:
        return {"taken": not is_free(int(port))}
    try:
        with socket.create_connection((address, int(port)), _SECONDS):
            return {}
    except ConnectionRefusedError:  # its machine is there, and says so
        return {}
    except OSError as error:
        return {"unreachable": reason(error)}


def _named() -> bool:
    return bool(os.environ.get("GLOO_SOCKET_IFNAME"))


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A failure where a name leads nowhere, or to the machine itself where others would have to come to it."""
    problems = [*_meeting(facts, places), *_names(facts, places)]
    told = []
    head = {rank: fact for rank, fact in facts.items() if fact.get("address")}
    for (address, port, found), _ in by_value(
        {r: (f["address"], f["port"], ", ".join(f["addresses"])) for r, f in head.items()}
    ).items():
        told.append(f"MASTER_ADDR {address} port {port or 'unset'} is {found}")
    if not head:
        told.append("no MASTER_ADDR")
    own = by_value({rank: f"{fact['hostname']} is {', '.join(fact['own'])}" for rank, fact in facts.items()})
    return conclude("rendezvous", some([*told, *own]), problems)


def _meeting(facts: Mapping[int, Facts], places: Places) -> Iterator[Problem]:
    for (address, error), ranks in by_value({r: (f.get("address"), f.get("error")) for r, f in facts.items()}).items():
        if error:
            todo = "set MASTER_ADDR to an IP address, or add the name to DNS or /etc/hosts of that machine"
            yield Problem(FAILURE, f"MASTER_ADDR {address} has no address on {places.text(ranks)} ({error})", todo)
    for rank, fact in facts.items():
        found = fact.get("addresses") or []
        if places.several and found and all(map(is_loopback, found)):
            text = f"MASTER_ADDR {fact['address']} is {found[0]} on {places.text([rank])}, which is each machine itself"
            yield Problem(FAILURE, text, "set it to an address of rank 0's machine that the others reach")
        if rank == 0 and places.several and found and not fact["head"]:
            text = f"MASTER_ADDR {fact['address']} is {', '.join(found)}, which rank 0's machine has not"
            yield Problem(WARNING, text, "set it to an address of rank 0's machine, unless a proxy leads there")
        if fact.get("taken"):
            text = f"port {fact['port']} of this machine is taken"
            yield Problem(FAILURE, text, "end what listens there (ss -ltnp), or choose another MASTER_PORT")
        if fact.get("unreachable"):
            text = f"{fact['address']} does not answer at port {fact['port']} ({fact['unreachable']})"
            yield Problem(FAILURE, text, "look at the firewall, and whether that machine is up")
        if fact.get("address") and not str(fact["port"]).isdigit():
            text = f"MASTER_PORT is {fact['port']!r} on {places.text([rank])}, which is no port"
            yield Problem(FAILURE, text, "set it to a free port of rank 0's machine, such as 29500")


def _names(facts: Mapping[int, Facts], places: Places) -> Iterator[Problem]:
    firsts = {node[0]: facts[node[0]] for node in places.nodes}
    for error, ranks in by_value({rank: fact["own_error"] for rank, fact in firsts.items()}).items():
        if error is not None:
            text = f"the machine's own name has no address on {places.text(ranks)} ({error})"
            yield Problem(WARNING, text, "add it to /etc/hosts with the address that others reach")
    home = {r: (f["own"][0], f["gloo"]) for r, f in firsts.items() if f["own"] and all(map(is_loopback, f["own"]))}
    for (address, gloo), ranks in by_value(home).items():
        if places.several:
            # torchrun's c10d rendezvous, and gloo without an interface, go by the name
            todo = "correct /etc/hosts, or name the interface in GLOO_SOCKET_IFNAME and torchrun's --local-addr"
            text = f"the machine's own name is {address} on {places.text(ranks)}, where others cannot come"
            yield Problem(WARNING if gloo else FAILURE, text, todo)
