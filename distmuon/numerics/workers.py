"""Several matrices at a time on a CPU, each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def spread(function: Callable[[T], object], items: Sequence[T]) -> None:
    """Call ``function`` on every item without gradients, on as many threads as torch uses, each computing on one.

    A small product gains nothing from a second thread, and two products at a time do. Results do not depend on
    the number of threads, as each item has one in any case.

    Raises:
        Exception: the first that ``function`` raises.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        torch.set_num_threads(1)
        try:
            for item in items:
                function(item)
        finally:
            torch.set_num_threads(threads)
        return
    inference = torch.is_inference_mode_enabled()

    def call(item: T) -> None:
        # both are a matter of the thread
        with torch.inference_mode(inference), torch.no_grad():
            function(item)

    try:
        with ThreadPoolExecutor(min(threads, len(items)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(call, items))
    finally:
        # the number counts for its own thread, but threads that start later begin with what was set last
        torch.set_num_threads(threads)
