"""Two hosts, and a run on them that others are compared with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# of which two_hosts is one, for the benchmark of overlap too
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
if BENCHMARKS not in sys.path:
    sys.path.append(BENCHMARKS)

from hosts_runs import trained  # noqa: E402
from two_hosts import NotPermitted, TwoHosts, two_hosts  # noqa: E402


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    try:
        with two_hosts() as both:
            yield both
    except NotPermitted as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the debug model on two hosts, two ranks each, over a cable of 1 Gbit/s."""
    try:
        with two_hosts() as both:
            both.rate(1000)
            return trained(both, tmp_path_factory.mktemp("undisturbed"))
    except NotPermitted as reason:
        pytest.skip(str(reason))
