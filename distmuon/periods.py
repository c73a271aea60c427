"""Which matrices are whole in a step, and which are orthogonalized in blocks between whole steps: MuonBP.

A step of a group is whole if its counter ``block_step`` is a multiple of ``block_period`` (arXiv 2510.16981). Counters
are compared when ranks bind their parameters, and every step that is made moves those of all ranks by one, since all
ranks agree on what a step is: so they choose the same plan without a word. A counter that somebody else writes, as a
state dict that is loaded, no longer is what the binding expects, and all ranks bind again and compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distmuon.groups import Group


def counted(groups: Sequence[Group]) -> dict[str, str]:
    """Where the groups with a period are in it, in words, by what the groups are called."""
    return {
        f"group {index} ({groups[index]['name']})" if groups[index].get("name") else f"group {index}": (
            f"block_step={groups[index]['block_step']} of block_period={groups[index]['block_period']}"
        )
        for index in periodic(groups)
    }


def periodic(groups: Sequence[Group]) -> Iterator[int]:
    """The groups whose matrices are not whole in every step, by index."""
    for index, group in enumerate(groups):
        if group["use_muon"] and group["block_period"] > 1:
            yield index


def in_blocks(groups: Sequence[Group]) -> frozenset[int]:
    """The groups whose matrices are orthogonalized in blocks in the step that comes, by index."""
    return frozenset(i for i in periodic(groups) if groups[i]["block_step"] % groups[i]["block_period"])


def advance(groups: Sequence[Group]) -> None:
    """Count a step that was made."""
    for index in periodic(groups):
        groups[index]["block_step"] += 1


def refuse_owner_gradients(groups: Sequence[Group]) -> None:
    """Refuse gradients that only owners have where the blocks of a matrix have owners of their own.

    Raises:
        ValueError: naming the group.
    """
    for label in counted(groups):
        raise ValueError(
            f"ddp_hook sends the gradient of a matrix to its owner, and {label} has a block_period, so that blocks of "
            "a matrix have owners of their own: take block_period=1, or leave the hook out."
        )
