"""Say where a run stands: ``python _state.py ARGUMENTS-OF-THE-TRAINER``; a script asks before and after a start.

Prints two words about the run that ``--resume auto`` would go on with. First its ``interrupted.json``, with what tells
it from a later one of the same words, or ``-`` if there is none, or if a person stopped the run. Then its last
checkpoint, or ``-``. With ``--tell TIME`` before the arguments, the first cause of what has failed since then goes to
standard error, with the file that has more.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from distmuon.pretrain.errors import UserError
from distmuon.pretrain.failures import FILE, read, sentence
from distmuon.pretrain.parse import parse_command


def main(arguments: list[str]) -> str:
    """The two words."""
    for folder in _folders(arguments):
        steps = [path for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
        if steps:
            newest = max(steps, key=lambda path: int(path.name[5:]))
            return f"{_note(folder / 'interrupted.json')} {folder.name}/{newest.name}"
    return "- -"


def _folders(arguments: list[str]) -> list[Path]:
    """The run folder of ``--resume``, or those of the name, the last one first."""
    command = parse_command(arguments)
    if command.resume not in (None, "auto"):
        given = Path(command.resume)
        return [given, *given.parents[:2]]
    base = Path(command.config.log.dir) / (command.config.log.name or "run")
    numbered = {}
    for path in base.parent.glob(f"{base.name}*"):
        match = re.fullmatch(r"(?:-(\d+))?", path.name[len(base.name) :])
        if match and path.is_dir():
            numbered[int(match[1] or 1)] = path
    return [numbered[number] for number in sorted(numbered, reverse=True)]


def _tell(arguments: list[str], since: float) -> None:
    """The newest of the files that name a first cause: in the run folders, or beside them before there is one."""
    log = parse_command(arguments).config.log
    beside = Path(log.dir) / f"{log.name or 'run'}.{FILE}"
    files = [path for path in (*(folder / FILE for folder in _folders(arguments)), beside) if path.is_file()]
    newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None and newest.stat().st_mtime >= since and (note := read(newest)) is not None:
        print(f"first cause: {sentence(note)}; see {newest}", file=sys.stderr)


def _note(path: Path) -> str:
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8"))["signal"] not in ("SIGTERM", "SIGUSR1"):
        return "-"
    stat = path.stat()
    return f"{stat.st_ino}:{stat.st_mtime_ns}"


if __name__ == "__main__":
    tells = sys.argv[1:2] == ["--tell"]
    given = sys.argv[3:] if tells else sys.argv[1:]
    try:
        print(main(given))
        if tells:
            _tell(given, float(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
