"""Has every rank a device of its own, of one kind, and with free memory?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch

from distmuon.calibrating.devices import device_name
from distmuon.diagnosing.findings import FAILURE, WARNING, Facts, Finding, Problem, by_value, conclude, size_text
from distmuon.diagnosing.places import Here, Places
from distmuon.numerics.hardware import has_native_bf16

# Less of a device's memory than this is free only where another process has some
_FREE = 0.9


def look(here: Here) -> Facts:
    """The device of this rank.

    Returns:
        ``device``, ``count`` of GPUs seen, ``local_rank``, ``visible`` (CUDA_VISIBLE_DEVICES); if there is a device for
        this rank also ``name``, ``bf16`` (whether it has units for it), and of a GPU ``uuid``, ``free`` and ``total``
        bytes; ``error`` if it cannot be used.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    facts: Facts = {"device": here.device, "local_rank": here.local_rank, "visible": visible, "count": 0}
    if here.device == "cpu":
        return {**facts, "name": device_name(torch.device("cpu")), "bf16": has_native_bf16("cpu")}
    facts["count"] = torch.cuda.device_count()
    if here.local_rank >= facts["count"]:
        return facts
    device = torch.device("cuda", here.local_rank)
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        return {**facts, "error": str(error).split("\n", 1)[0].rstrip(".")}
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    facts |= {"name": device_name(device), "bf16": has_native_bf16("cuda")}
    return {**facts, "uuid": uuid, "free": free, "total": total}


def usable(facts: Mapping[int, Facts]) -> bool:
    """Whether every rank has a GPU."""
    return all(fact.get("device") == "cuda" and "free" in fact for fact in facts.values())


def judge(facts: Mapping[int, Facts], places: Places) -> Finding:
    """A failure where a rank has no device of its own; a warning where kinds differ or memory is taken."""
    problems = [*_missing(facts, places), *_shared(facts, places), *_taken(facts, places)]
    have = {rank: fact for rank, fact in facts.items() if "name" in fact}
    kinds = by_value({rank: (fact["name"], fact["bf16"]) for rank, fact in have.items()})
    if len(kinds) > 1:
        found = "kinds differ: " + ", ".join(f"{kind[0]} on {places.text(ranks)}" for kind, ranks in kinds.items())
        todo = "take machines of one kind: the slowest sets the pace, and roundings may differ"
        problems.append(Problem(WARNING, found, todo))
    texts = [f"{name}, {_units(bf16)}" for name, bf16 in kinds]
    free = [fact["free"] for fact in have.values() if "free" in fact]
    texts += [f"at least {size_text(min(free))} free"] if free else []
    return conclude("devices", "; ".join(texts), problems)


def _units(bf16: bool) -> str:
    return "with bfloat16 units" if bf16 else "without bfloat16 units, so products are computed in float32"


def _missing(facts: Mapping[int, Facts], places: Places) -> Iterator[Problem]:
    on_cpu = [rank for rank, fact in facts.items() if fact["device"] == "cpu"]
    if on_cpu and len(on_cpu) < len(facts):
        todo = "look at nvidia-smi there, and at the GPUs that the job asked for"
        yield Problem(FAILURE, f"no GPU is seen by {places.text(on_cpu)}, while others see some", todo)
    for rank, fact in facts.items():
        where = places.text([rank])
        if "error" in fact:
            yield Problem(FAILURE, f"the GPU of {where} cannot be used ({fact['error']})", "look at nvidia-smi there")
        elif fact["device"] == "cuda" and "free" not in fact:
            told = "" if fact["visible"] is None else f", with CUDA_VISIBLE_DEVICES={fact['visible']}"
            found = f"{where} needs GPU {fact['local_rank']} and sees {fact['count']}{told}"
            todo = "let every rank of a machine see all of its GPUs, and start no more ranks than GPUs"
            yield Problem(FAILURE, found, todo)


def _shared(facts: Mapping[int, Facts], places: Places) -> Iterator[Problem]:
    for ranks in by_value({rank: fact["uuid"] for rank, fact in facts.items() if "uuid" in fact}).values():
        if len(ranks) > 1:
            yield Problem(FAILURE, f"{places.text(ranks)} have the same GPU", "give each a GPU of its own")


def _taken(facts: Mapping[int, Facts], places: Places) -> Iterator[Problem]:
    for rank, fact in facts.items():
        if "free" in fact and fact["free"] < _FREE * fact["total"]:
            found = (
                f"of the GPU of {places.text([rank])} {size_text(fact['free'])} of {size_text(fact['total'])} are free"
            )
            yield Problem(WARNING, found, "end what else runs there: nvidia-smi names it")
