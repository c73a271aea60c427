"""What ``distmuon doctor`` prints and writes."""

from __future__ import annotations

import json
import pathlib
import shutil
import textwrap
from dataclasses import asdict

from distmuon.diagnosing.findings import FAILURE, OK, WARNING, Finding
from distmuon.diagnosing.session import Report

_MARKS = {OK: "ok", WARNING: "WARNING", FAILURE: "FAILURE"}
_MARK, _NAME = max(map(len, _MARKS.values())) + 2, 15
_WIDTHS = (80, 120)


def text(report: Report) -> str:
    """One paragraph per check: its mark, what was found, and what to do; then the sum of them."""
    width = min(max(shutil.get_terminal_size((_WIDTHS[1], 24)).columns, _WIDTHS[0]), _WIDTHS[1])
    lines = [_title(report), ""]
    for finding in report.findings:
        lines += _paragraph(finding, width)
    return "\n".join([*lines, "", _sum(report)])


def write(report: Report, path: pathlib.Path, *, code: int) -> None:
    """Write it all as JSON, with the facts that findings were made of.

    Args:
        report: What was found.
        path: Of the file.
        code: The exit code.

    Raises:
        OSError: if it cannot be written.
    """
    tree = {
        "exit_code": code,
        "ranks": report.size,
        "nodes": [{"host": report.places.hosts[node[0]], "ranks": list(node)} for node in report.places.nodes],
        "findings": [asdict(finding) for finding in report.findings],
        "facts": report.facts,
    }
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _title(report: Report) -> str:
    nodes = report.places.nodes
    came = sum(map(len, nodes))
    ranks = f"{came} rank{'s' * (came > 1)}" if came == report.size else f"{came} of {report.size} ranks"
    machines = ", ".join(report.places.hosts[node[0]] for node in nodes[:4]) + ", ..." * (len(nodes) > 4)
    return f"{ranks} on {len(nodes)} machine{'s' * (len(nodes) > 1)}: {machines}"


def _paragraph(finding: Finding, width: int) -> list[str]:
    indent = " " * (_MARK + _NAME)
    first = f"{_MARKS[finding.status]:<{_MARK}}{finding.check:<{_NAME}}"
    lines = _wrap(finding.found, width, first, indent)
    if finding.todo:
        lines += _wrap(finding.todo, width, f"{indent}-> ", f"{indent}   ")
    return lines


def _wrap(text: str, width: int, first: str, indent: str) -> list[str]:
    """Lines that break at blanks alone, so that a path can be copied."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _sum(report: Report) -> str:
    counts = {status: sum(finding.status == status for finding in report.findings) for status in _MARKS}
    failures, warnings = counts[FAILURE], counts[WARNING]
    return f"{counts[OK]} ok, {warnings} warning{'s' * (warnings != 1)}, {failures} failure{'s' * (failures != 1)}"
