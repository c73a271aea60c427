import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from harness import Pool


@pytest.fixture(scope="session")
def pool():
    """One pair of ranks for all libraries, as to import these takes longer than the tests."""
    with Pool(2) as pool:
        yield pool
