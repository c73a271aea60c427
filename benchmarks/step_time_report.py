"""What step_time.py shows: a table a world size, and a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from step_time_contenders import BASELINE
from step_time_ranks import Row


def baseline_ms(rows: Sequence[Row]) -> float | None:
    """Median of ``torch.optim.Muon`` with every matrix on every rank, None if it was not timed."""
    for row in rows:
        if (row.name, row.layout) == BASELINE and row.timing:
            return row.timing.median
    return None


def make_table(rows: Sequence[Row], ranks: int, bucket: int) -> Table:
    """One row a contender; the notes stand below it."""
    base = baseline_ms(rows)
    table = Table(title=f"ranks: {ranks}", box=box.SIMPLE, padding=(0, 1), title_justify="left")
    table.add_column("optimizer", overflow="fold", min_width=18)
    table.add_column("layout", no_wrap=True)
    for column in (
        "step ms\nmedian",
        "fastest to\nslowest",
        "of torch\nMuon",
        "sent MB\nall ranks",
        "least\nMB",
        "peak MB\na rank",
        "of a\nbucket",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row.timing is None:
            table.add_row(row.name, row.layout, "failed", *[""] * 6)
            continue
        time = row.timing
        table.add_row(
            row.name,
            row.layout,
            f"{time.median:.1f}{'' if row.quiet else '*'}",
            f"{time.fastest:.1f} to {time.slowest:.1f}",
            f"{time.median / base:.3f}" if base else "-",
            "-" if row.sent_bytes is None else f"{row.sent_bytes / 1e6:.1f}",
            f"{row.least_bytes / 1e6:.1f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / bucket:.2f}",
        )
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know beside the table: peculiarities, failures, disturbed samples, stages."""
    lines = [f"{name}: {note}." for name, note in dict.fromkeys((row.name, row.note) for row in rows) if note]
    lines += [f"{row.name}, {row.layout}, failed: {row.error}" for row in rows if row.error]
    if any(row.timing and not row.quiet for row in rows):
        lines.append("* No sample of this row was quiet: other processes used the cores. Do not cite it.")
    for row in rows:
        if row.stats:
            stages = ", ".join(f"{key.removeprefix('optim/')} {value:.4g}" for key, value in row.stats.items())
            lines.append(f"{row.name}, {row.layout}, last step of rank 0: {stages}")
    return lines


def draw(results: Mapping[int, Sequence[Row]], model: str, path: Path) -> None:
    """One row of panels a world size: time with its spread, bytes with their minimum, peak memory."""
    from matplotlib.figure import Figure

    longest = max(len(rows) for rows in results.values())
    figure = Figure(figsize=(15, len(results) * (1.2 + 0.32 * longest)), layout="constrained")
    figure.suptitle(f"optimizer.step(), {model}")
    panels = figure.subplots(len(results), 3, squeeze=False)
    for (left, middle, right), (ranks, rows) in zip(panels, results.items(), strict=True):
        timed = [row for row in reversed(rows) if row.timing]  # barh begins at the bottom
        labels = [f"{row.name}, {row.layout}" for row in timed]
        colors = ["tab:blue" if row.name.startswith("distmuon") else "tab:gray" for row in timed]
        times = [row.timing for row in timed if row.timing]
        medians = [time.median for time in times]
        errors = [[t.median - t.fastest for t in times], [t.slowest - t.median for t in times]]
        bars = left.barh(labels, medians, xerr=errors, color=colors, ecolor="black", capsize=2)
        left.bar_label(bars, fmt="%.4g", padding=4, fontsize="small")
        left.set(xlabel="ms (median; fastest to slowest)", title=f"{ranks} ranks")
        bars = middle.barh(labels, [(row.sent_bytes or 0) / 1e6 for row in timed], color=colors)
        middle.bar_label(bars, fmt="%.4g", padding=4, fontsize="small")
        middle.plot([row.least_bytes / 1e6 for row in timed], labels, "k|", markersize=12, label="least")
        middle.set(xlabel="MB sent, all ranks together", yticklabels=[])
        middle.legend()
        bars = right.barh(labels, [(row.peak_bytes or 0) / 1e6 for row in timed], color=colors)
        right.bar_label(bars, fmt="%.4g", padding=4, fontsize="small")
        right.set(xlabel="peak temporary MB of a rank", yticklabels=[])
        for panel in (left, middle, right):
            panel.margins(x=0.15)  # room for the numbers
    figure.savefig(path, dpi=120)
