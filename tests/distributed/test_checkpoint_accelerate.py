"""accelerate saves and loads the optimizer under DDP and FSDP2."""

import pytest
from harness import Pool

pytest.importorskip("accelerate")

from checkpoint_accelerate import saved_and_loaded


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as pool:
        yield pool


@pytest.mark.parametrize(
    ("kind", "distributed"), [("ddp", "MULTI_CPU"), ("SHARDED_STATE_DICT", "FSDP"), ("FULL_STATE_DICT", "FSDP")]
)
def test_saved_and_loaded(pool, tmp_path, kind, distributed):
    for found, where, count in pool.run(saved_and_loaded, kind, tmp_path):
        assert found == []
        assert (where, count) == (distributed, 20)
