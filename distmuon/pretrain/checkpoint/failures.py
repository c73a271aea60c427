"""What went wrong with a checkpoint, in a few words."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException

_LONGEST = 300


def reason(error: BaseException) -> str:
    """An error in one line; of what DCP wraps, the error of the first rank that had one."""
    if isinstance(error, CheckpointException) and error.failures:
        return reason(error.failures[min(error.failures)][0])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:_LONGEST].rstrip(" .") if lines else ""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    # the message of a KeyError is the key alone
    return text if text and not isinstance(error, LookupError) else f"{type(error).__name__} {text}".strip()
