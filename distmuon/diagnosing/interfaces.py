"""Which interface and address would gloo and NCCL take, and can other machines come there?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from distmuon.diagnosing.adapters import adapters, leads_nowhere
from distmuon.diagnosing.findings import FAILURE, WARNING, Facts, Finding, Problem, by_value, conclude, some
from distmuon.diagnosing.names import addresses, is_loopback, is_own
from distmuon.diagnosing.places import Here, Places

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_NAME_IT = "export {}=NAME, of an interface that leads to the other machines (ip -brief address lists them)"


def look(here: Here) -> Facts:
    """The interfaces of this machine, and gloo's choice.

    Returns:
        ``adapters`` by name, ``gloo`` and ``nccl`` (the variables, None where not set), ``device``, and what gloo
        takes: ``names`` and ``address``.
    """
    found = adapters()
    gloo = os.environ.get(_GLOO) or None
    facts: Facts = {"adapters": found, "gloo": gloo, "nccl": os.environ.get(_NCCL) or None, "device": here.device}
    if gloo is not None:
        names = gloo.split(",")
        own = [address for name in names for address in _addresses(found, name)]
        return {**facts, "names": names, "address": own[0] if own else None}
    address = _by_name(here.hostname)
    holders = [name for name in found if address in _addresses(found, name)]
    return {**facts, "names": holders or (["lo"] if is_loopback(address) else []), "address": address}


def _by_name(hostname: str) -> str:
    """The address that gloo takes if no interface is named: the first of the host's name that is its own."""
    try:
        return next((address for address in addresses(hostname) if is_own(address)), "127.0.0.1")
    except OSError:
        return "127.0.0.1"


def _addresses(found: Mapping[str, Mapping[str, object]], name: str) -> list[str]:
    own = found.get(name, {}).get("addresses", [])
    assert isinstance(own, list)
    return own


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A failure where an interface is missing, down or without address, or leads nowhere between machines."""
    problems: list[Problem] = []
    # of many ranks that have the same problem it is told once
    for of in (_of_gloo, _of_nccl):
        own = {rank: tuple(of(fact, places.several)) for rank, fact in facts.items()}
        for same, ranks in by_value(own).items():
            problems += [replace(problem, found=problem.found.replace("{}", places.text(ranks))) for problem in same]
    problems += _twice(facts, places)
    told = by_value({r: f"gloo takes {'/'.join(f['names']) or 'no name'}, {f['address']}" for r, f in facts.items()})
    return conclude("interfaces", some(told), problems)


def _of_gloo(fact: Facts, several: bool) -> Iterator[Problem]:
    """With ``{}`` for the ranks, as of the others below."""
    todo = _NAME_IT.format(_GLOO)
    if fact["gloo"] is not None:
        yield from _named(fact, _GLOO, fact["names"], several, FAILURE)
    elif several and (is_loopback(fact["address"]) or any(map(leads_nowhere, fact["names"]))):
        found = f"gloo on {{}} would take {fact['address']} ({'/'.join(fact['names'])}), where others cannot come"
        yield Problem(FAILURE, found, todo)


def _of_nccl(fact: Facts, several: bool) -> Iterator[Problem]:
    pattern = fact["nccl"]
    # with ^ it names those that are not taken
    if pattern is None or pattern.startswith("^"):
        return
    exact = pattern.startswith("=")
    wanted = [entry.split(":", 1)[0] for entry in pattern.removeprefix("=").split(",")]
    names = [n for n in fact["adapters"] if any(n == w if exact else n.startswith(w) for w in wanted)]
    # without GPUs nobody asks for it
    bad = FAILURE if fact["device"] == "cuda" else WARNING
    complaints = {name: list(_named(fact, _NCCL, [name], several, bad)) for name in names or [pattern]}
    # of those that begin so it takes one that works
    if all(complaints.values()):
        yield from (problem for problems in complaints.values() for problem in problems)


def _named(fact: Facts, variable: str, names: list[str], several: bool, status: str) -> Iterator[Problem]:
    todo = _NAME_IT.format(variable)
    for name in names:
        adapter = fact["adapters"].get(name)
        if adapter is None:
            there = ", ".join(fact["adapters"])
            yield Problem(status, f"{variable} names {name}, and on {{}} there are {there}", todo)
        elif not adapter["up"]:
            yield Problem(status, f"{variable} names {name}, which is down on {{}}", f"ip link set {name} up; {todo}")
        elif not adapter["addresses"]:
            yield Problem(status, f"{variable} names {name}, which has no address on {{}}", todo)
        elif several and leads_nowhere(name):
            yield Problem(status, f"{variable} names {name} on {{}}, which leads to no other machine", todo)


def _twice(facts: Mapping[int, Facts], places: Places) -> Iterator[Problem]:
    """Machines with one address: of a bridge that each has for itself."""
    firsts = {node[0]: facts[node[0]]["address"] for node in places.nodes}
    for address, ranks in by_value(firsts).items():
        if len(ranks) > 1 and address is not None and not is_loopback(address):
            found = f"{places.text(ranks)} are on different machines, and gloo would take {address} on each"
            yield Problem(FAILURE, found, _NAME_IT.format(_GLOO))
