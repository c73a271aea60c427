"""What the tests on ranks share."""

import pytest
from harness import Pools


@pytest.fixture(scope="module")
def pools():
    """Calls a function on so many ranks, which live as long as the tests of a module."""
    made = Pools()
    yield made
    made.close()
