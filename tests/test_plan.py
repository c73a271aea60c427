import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmuon.plan.matrices import MatrixSpec, matrix_spec
from distmuon.plan.plan import build_plan

few = st.integers(1, 4)
specs = st.lists(st.builds(MatrixSpec, parameter=st.text(max_size=3), count=few, rows=few, cols=few), max_size=20)


@given(specs=specs, kinds=st.data(), bucket_numel=st.integers(1, 200))
def test_every_matrix_is_in_one_bucket_of_its_shape(specs, kinds, bucket_numel):
    drawn = kinds.draw(st.lists(st.sampled_from("ab"), min_size=len(specs), max_size=len(specs)))
    plan = build_plan(specs, kinds=drawn, bucket_numel=bucket_numel)
    members = [index for bucket in plan.buckets for index in bucket.members]
    assert sorted(members) == list(range(len(specs)))
    for bucket in plan.buckets:
        assert bucket.specs == tuple(specs[index] for index in bucket.members)
        assert {(spec.rows, spec.cols) for spec in bucket.specs} == {(bucket.rows, bucket.cols)}
        assert len({drawn[index] for index in bucket.members}) == 1
        assert bucket.numel <= bucket_numel or len(bucket.members) == 1
    assert build_plan(specs, kinds=drawn, bucket_numel=bucket_numel) == plan
    assert hash(plan) == hash(build_plan(specs, kinds=drawn, bucket_numel=bucket_numel))


@given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=5), flatten=st.booleans())
def test_a_spec_covers_its_parameter(shape, flatten):
    if len(shape) > 3 and not flatten:
        with pytest.raises(ValueError, match="matrix axes are not known"):
            matrix_spec("w", shape, flatten=flatten)
        return
    spec = matrix_spec("w", shape, flatten=flatten)
    product = 1
    for size in shape:
        product *= size
    assert spec.numel == product
    assert spec.stacked_shape[0] == (shape[0] if len(shape) == 3 and not flatten else 1)
