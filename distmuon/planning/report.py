"""What ``distmuon plan`` prints of a prediction: tables of ranks, of the step, and of other ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distmuon.planning.advice import Advice
from distmuon.planning.classes import RankClass, classes
from distmuon.planning.figures import Prediction
from distmuon.planning.predict import MFU

# So many classes are shown; of more, the busiest and the idlest and some between
_MOST_CLASSES = 10


def show(prediction: Prediction, advice: Advice | None, *, tokens_per_gpu: int, console: Console) -> None:
    """Print everything about one step."""
    console.print(Text(headline(prediction)))
    console.print(Text(f"cost table: {prediction.setup.device.table.source}"), "")
    console.print(*_class_tables(prediction), sep="\n")
    console.print(_step_table(prediction, tokens_per_gpu))
    console.print(_rival_table(prediction))
    if advice is not None:
        console.print(Text(str(advice)))


def show_comparison(rows: Sequence[Prediction | str], console: Console) -> None:
    """Print a row for each layout and number of nodes; text stands for a plan that does not fit."""
    figures = _table("Layouts and world sizes", "layout", "ranks", "teams", "step ms", "NS ms", "over ideal", "dion")
    rest = _table("", "layout", "ranks", "over bound", "exposed ms", "of training", "states GiB", "buffers MiB")
    unfit = []
    for row in rows:
        if isinstance(row, str):
            unfit.append(row)
            continue
        who = str(row.setup.layout), str(row.setup.layout.world)
        figures.add_row(
            *who,
            teams_text(row),
            _ms(row.seconds),
            _ms(row.makespan),
            f"{row.over_ideal:.2f}",
            f"{row.rivals[0].makespan / row.ideal:.2f}",
        )
        rest.add_row(
            *who,
            f"{row.over_bound:.2f}",
            _ms(row.exposed),
            f"{row.share:.1%}",
            f"{max(r.states.total for r in row.ranks) / 2**30:.1f}",
            f"{max(r.buffers for r in row.ranks) / 2**20:.0f}",
        )
    console.print(figures)
    console.print(rest)
    for reason in unfit:
        console.print(Text(f"left out: {reason}"))


def headline(prediction: Prediction) -> str:
    """What is predicted, in a line."""
    setup = prediction.setup
    layout, model = setup.layout, setup.model
    count = sum(p.count for p in model.on_muon)
    numel = sum(p.numel for p in model.on_muon)
    where = f"{layout.nodes} node{'s' * (layout.nodes > 1)} of {layout.gpus_per_node} x {setup.device.name}"
    return (
        f"{model.name}: {count:,} matrices with {numel / 1e9:,.2f} of {model.numel / 1e9:,.2f} B elements on Muon; "
        f"{layout} on {where}, buckets of {setup.bucket_mib:g} MiB"
    )


def teams_text(prediction: Prediction) -> str:
    """How many matrices are owned by teams of which size."""
    found = [f"{count:,} by {size}" for size, count in prediction.teams().items() if size > 1]
    return ", ".join(found) or "none"


def _class_tables(prediction: Prediction) -> tuple[Table, Table]:
    """What ranks of each class do, and what they move and hold: two tables, as one would not fit a terminal."""
    times = _table(
        "Ranks by what they own, busiest first", "ranks", "whole matrices", "in teams", "NS ms", "waits ms", "done ms"
    )
    title = "What they move, in the node + between nodes, and hold; MiB"
    moved = _table(title, "ranks", "out", "in", "buffers", "momentum")
    found = classes(prediction.ranks)
    for these in _some(found):
        if these is None:
            for table in (times, moved):
                table.add_row(f"... {len(found) - _MOST_CLASSES} more")
            continue
        first = these.members[0]
        traffic = [
            tuple(max(getattr(member, way)[far] for member in these.members) for far in (0, 1))
            for way in ("sent", "received")
        ]
        seconds = [_ms(these.worst(key)) for key in ("ns", "waiting", "finish")]
        times.add_row(these.label(), str(first.whole), str(first.shared), *seconds)
        moved.add_row(
            these.label(),
            *(f"{_mib(near)} + {_mib(far)}" for near, far in traffic),
            _mib(these.worst("buffers")),
            _mib(max(m.states.momentum for m in these.members)),
        )
    return times, moved


def _some(found: Sequence[RankClass]) -> Iterator[RankClass | None]:
    """All classes, or some of them and None for the others."""
    if len(found) <= _MOST_CLASSES + 1:
        yield from found
        return
    yield from found[: _MOST_CLASSES - 2]
    yield None
    yield from found[-2:]


def _step_table(prediction: Prediction, tokens_per_gpu: int) -> Table:
    table = Table("The step", "", box=box.SIMPLE_HEAD, title_justify="left")
    p = prediction
    table.columns[1].justify = "right"
    rows = (
        ("predicted step", f"{_ms(p.seconds)} ms"),
        ("makespan of orthogonalization", f"{_ms(p.makespan)} ms"),
        ("ideal: work of single owners / ranks", f"{_ms(p.ideal)} ms"),
        ("makespan over ideal", f"{p.over_ideal:.2f}"),
        ("makespan over the lower bound of any plan", f"{p.over_bound:.2f}"),
        ("exposed: exchange, passes over memory, waiting", f"{_ms(p.exposed)} ms"),
        ("the busiest link alone", f"{_ms(p.links)} ms"),
        ("sent between nodes, all ranks together", f"{_mib(p.between)} MiB"),
        ("matrices owned by teams", teams_text(p)),
        ("weights, gradients and states of a rank, float32", f"{max(r.states.total for r in p.ranks) / 2**30:.1f} GiB"),
        (f"forward and backward of {tokens_per_gpu:,} tokens a rank, at {MFU:.0%} of peak", f"{_ms(p.training)} ms"),
        ("share of a whole training step", f"{p.share:.1%}"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _rival_table(prediction: Prediction) -> Table:
    table = _table("Ways to choose owners", "way", "makespan ms", "over ideal")
    table.add_row("this plan", _ms(prediction.makespan), f"{prediction.over_ideal:.2f}")
    for rival in prediction.rivals:
        table.add_row(rival.name, _ms(rival.makespan), f"{rival.makespan / prediction.ideal:.2f}")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right")
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.0f}"
