"""A call that may not return: awaited so long and no longer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a thread of its own.

    A name server that is silent, a mount that is gone and a collective whose peer is lost cannot be interrupted. Their
    thread is left behind, and ends with the process.

    Args:
        seconds: How long it may take.
        function: What is called.

    Raises:
        TimeoutError: if it takes longer.
        BaseException: what the function raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:  # it is raised where it is awaited
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"not finished after {seconds:g} s")
    return results[0]
